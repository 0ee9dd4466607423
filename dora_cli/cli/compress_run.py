"""What ``dora-compress`` does: an adapter's singular values read, ranked and cut, and a smaller adapter written.

Modules are read one at a time, twice: for their singular values, and for the factors of what is kept of each.
"""

import json
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from dora_cli.checkpoints.adapter_file import AdapterFile, Update, read_adapter
from dora_cli.checkpoints.adapter_format import (
    CONFIG,
    METHOD,
    PREFIX,
    LowRank,
    TokenRows,
    WeightDecomposed,
    write_adapter,
)
from dora_cli.checkpoints.atomic import atomic_write_text, require_new_folder
from dora_cli.checkpoints.base_folder import copy_small_files
from dora_cli.checkpoints.compress import (
    Choice,
    Spectra,
    limit,
    one_rank_reaching,
    one_rank_within,
    reaching,
    share_of,
    singular_values,
    truncated,
    within,
)
from dora_cli.checkpoints.json_io import read_json, strings, take
from dora_cli.checkpoints.safetensors_io import read_tensor
from dora_cli.cli import run_folder
from dora_cli.cli.compress import Options
from dora_cli.cli.publish_run import write_compressed_card
from dora_cli.config.recipes import choices, recipes_dir
from dora_cli.errors import UserError

RECORD = "compress.json"
SHARES = (0.75, 0.5, 0.25, 0.1)  # of the parameters, in the table of a dry run
PER_PARAMETER = "energy_per_parameter"
MOST, WIDEST = 3, 44  # modules that are shown, and columns for their names
# Of method.json: what was true of the adapter as it was trained, and counts what is no longer there.
OF_TRAINING = ("step", "metrics", "modules")


def compress_adapter(options: Options) -> int:
    """Compress, or say what would be kept. Returns the exit code."""
    out = options.out
    if out is not None:
        require_new_folder(out)
    adapter = read_adapter(options.checkpoint)
    _require_low_rank(adapter)
    take(adapter.method, "recipe", str, adapter.folder / METHOD, None)  # the card will name it
    spectra = read_spectra(adapter)
    choice = choose(options, spectra, len({*_noted(adapter), *spectra.names}))
    facts = _facts(options, choice)
    if options.dry_run == "json":
        print(json.dumps(facts | {"curve": curve(options, spectra)}, indent=2))
    elif options.dry_run == "true":
        print("\n".join([*describe(adapter, choice, "would be written"), *table(options, spectra)]))
    elif options.out is not None:
        write(options.out, adapter, choice, facts)
        print("\n".join([*describe(adapter, choice, "written"), *_next_steps(options.out, adapter)]))
    return 0


def read_spectra(adapter: AdapterFile) -> Spectra:
    """The singular values of every module.

    Raises:
        UserError: a factor holds numbers that are not finite, or there is no update at all.
    """
    order = {name: place for place, name in enumerate(_noted(adapter))}  # the model's; a file is sorted by name
    parts = dict(sorted(adapter.modules.parts.items(), key=lambda part: order.get(part[0], len(order))))
    values = []
    for name in parts:
        update = adapter.modules[name]
        assert isinstance(update, LowRank)
        values.append(singular_values(update.a, update.b))
    spectra = Spectra(list(parts), [p.rank for p in parts.values()], [sum(p.shape) for p in parts.values()], values)
    if not any(spectra.ranks):
        raise UserError(
            f"{adapter.folder} changes nothing: every module's update is 0",
            hint="it was saved before it was trained; there is nothing to compress",
        )
    return spectra


def choose(options: Options, spectra: Spectra, n_targets: int) -> Choice:
    """What is kept of every module, by the budget or the energy that is asked for.

    Args:
        n_targets: modules over which an average rank is one.

    Raises:
        UserError: the budget keeps nothing, or more than there is.
    """
    if options.energy is not None:
        if options.uniform:
            return one_rank_reaching(spectra, options.energy)
        return reaching(spectra, options.energy, _rank_by(options))
    assert options.budget is not None
    target = limit(options.budget, spectra, len(spectra.names) if options.uniform else n_targets)
    return one_rank_within(spectra, target) if options.uniform else within(spectra, target, _rank_by(options))


def write(out: Path, adapter: AdapterFile, choice: Choice, facts: dict[str, Any]) -> None:
    """Write the adapter with what is kept of each module; all else of it as it was."""
    modules: list[LowRank] = []
    for name, rank in zip(choice.spectra.names, choice.ranks, strict=True):
        update = adapter.modules[name]
        assert isinstance(update, LowRank)
        a, b = truncated(update.a, update.b, rank)
        if isinstance(update, WeightDecomposed):
            modules.append(WeightDecomposed(name, a, b, update.transposed, magnitude=update.magnitude))
        else:
            modules.append(LowRank(name, a, b, update.transposed))

    def beside(folder: Path) -> None:
        copy_small_files(adapter.folder, folder)  # the tokenizer of new tokens
        atomic_write_text(folder / RECORD, json.dumps(facts, indent=1) + "\n")

    ranks = dict(zip(choice.spectra.names, choice.ranks, strict=True))
    method = {key: value for key, value in adapter.method.items() if key not in OF_TRAINING}
    config = adapter.folder / CONFIG
    write_adapter(
        out,
        modules=modules,
        head=_head(adapter, {name for name, rank in ranks.items() if rank or choice.uniform}),
        head_modules=strings(read_json(config), "modules_to_save", config),
        base_name=adapter.base_name,
        task_type=adapter.task_type,
        export="uniform" if choice.uniform else "exact",
        method={**method, "ranks": dict.fromkeys(_noted(adapter), 0) | ranks},
        revision=adapter.revision,
        tokens=[TokenRows(t.name, t.ids, read_tensor(t.rows)) for t in adapter.tokens.values()],
        beside=beside,
    )
    before, after = choice.spectra.parameters, choice.parameters
    done = f"Compressed from {before:,} to {after:,} parameters, which changes its updates by {choice.error:.1%}."
    write_compressed_card(out, adapter.folder, done)


def describe(adapter: AdapterFile, choice: Choice, done: str) -> list[str]:
    """What is kept and what is lost, in lines of at most 80 columns, paths apart."""
    spectra, ranks = choice.spectra, choice.ranks
    before, after = spectra.parameters, choice.parameters
    stored, dependent = sum(spectra.stored), sum(spectra.stored) - sum(spectra.ranks)
    lines = [
        f"{done}: {before:,} → {after:,} parameters ({100 * after / before:.1f} %)",
        f"  adapter     {adapter.folder}",
        f"  components  {stored:,} → {sum(ranks):,}" + (f", {dependent:,} changed nothing" if dependent else ""),
        f"  ranks       {min(ranks)} to {max(ranks)} in {_count(len(ranks), 'module')}"
        + (f", {ranks.count(0):,} of them emptied" if 0 in ranks else ""),
        f"  kept        {_percent(choice.energy)} of Σσ²; relative error of ΔW {choice.error:.3g}",
    ]
    if choice.uniform:
        lines.append(f"  uniform     rank {max(ranks)} in every module")
    if adapter.head:
        lines.append(f"  head        {_count(len(adapter.head), 'tensor')} as trained")
    if adapter.tokens:
        most = max(len(rows.ids) for rows in adapter.tokens.values())
        lines.append(f"  tokens      {_count(most, 'embedding')} as trained")
    if any(isinstance(part, Update) and part.magnitude for part in adapter.modules.parts.values()):
        lines.append("  magnitudes  as trained; errors are those of B A, before rows are rescaled")
    return [*lines, *_most_lost(choice)]


def _most_lost(choice: Choice) -> list[str]:
    """The modules in which most of the lost energy was."""
    lost, errors = choice.lost, choice.errors
    worst = [m for m in sorted(range(len(lost)), key=lambda m: -lost[m]) if lost[m]][:MOST]
    lines = [f"  lost most   {'':<{WIDEST}}{'rank':>10}{'error':>10}"] if worst else []
    for m in worst:
        name, ranks = choice.spectra.names[m], f"{choice.spectra.stored[m]} → {choice.ranks[m]}"
        short = name if len(name) <= WIDEST else f"…{name[1 - WIDEST :]}"
        lines.append(f"              {short:<{WIDEST}}{ranks:>10}{errors[m]:>10.3g}")
    return lines


def table(options: Options, spectra: Spectra) -> list[str]:
    """What other budgets would keep, in columns."""
    titles = ("budget", "parameters", "components", "kept of Σσ²", "error")
    rows = []
    for row in curve(options, spectra):
        counts = (f"{row['share']:g}", f"{row['parameters']:,}", f"{row['components']:,}")
        rows.append((*counts, _percent(row["energy"]), f"{row['error']:.3g}"))
    return ["", *("  " + "".join(f"{cell:>14}" for cell in row) for row in (titles, *rows))]


def curve(options: Options, spectra: Spectra) -> list[dict[str, Any]]:
    """The same as numbers: for some shares of the parameters, as far as these keep anything."""
    rows = []
    for share in SHARES:
        target = share_of(spectra, share)
        if target.limit < (sum(spectra.costs) if options.uniform else min(spectra.costs)):
            continue
        rank_by = options.rank_by or PER_PARAMETER
        choice = one_rank_within(spectra, target) if options.uniform else within(spectra, target, rank_by)
        rows.append({"share": share, **_totals(choice)})
    return rows


def _facts(options: Options, choice: Choice) -> dict[str, Any]:
    """What ``compress.json`` holds."""
    spectra, errors = choice.spectra, choice.errors
    return {
        "checkpoint": str(options.checkpoint),
        "budget": options.budget.text if options.budget else None,
        "energy": options.energy,
        "rank_by": None if options.uniform else _rank_by(options),
        "export": "uniform" if options.uniform else "exact",
        "before": {"parameters": spectra.parameters, "components": sum(spectra.stored)},
        "after": _totals(choice),
        "modules": {
            name: {
                "before": spectra.stored[m],
                "after": choice.ranks[m],
                "error": errors[m],
                "kept": _numbers(spectra.values[m][: choice.ranks[m]]),
                "lost": _numbers(spectra.values[m][choice.ranks[m] :]),
            }
            for m, name in enumerate(spectra.names)
        },
    }


def _totals(choice: Choice) -> dict[str, Any]:
    return {
        "parameters": choice.parameters,
        "components": sum(choice.ranks),
        "energy": choice.energy,
        "error": choice.error,
    }


def _rank_by(options: Options) -> str:
    """As asked for, else what loses least at a budget of its kind: of components, or of parameters."""
    counts_components = options.budget is not None and options.budget.kind == "average"
    return options.rank_by or ("energy" if counts_components else PER_PARAMETER)


def _require_low_rank(adapter: AdapterFile) -> None:
    """Refuse what has no factors to make smaller."""
    if adapter.kind == "MORA":
        raise UserError(
            f"{adapter.folder} holds square updates, which have no components: each is of high rank by design",
            hint="train it with method=mora_components, whose updates can be compressed, or with a smaller budget",
        )
    if adapter.kind == "FULL" or not adapter.modules:
        raise UserError(f"{adapter.folder} holds whole parameters and no low-rank update", hint="compress an adapter")


def _noted(adapter: AdapterFile) -> dict[str, Any]:
    """The modules that were adapted, as our own adapters note them: the file leaves out those of rank 0."""
    noted: dict[str, Any] = take(adapter.method, "ranks", dict, adapter.folder / METHOD, {})
    return noted


def _head(adapter: AdapterFile, adapted: set[str]) -> dict[str, Tensor]:
    """What was trained in full, under the names that the file has for it.

    PEFT calls the bias of an adapted module ``MODULE.base_layer.bias``, and looks for that alone.
    """
    head = {}
    for name, entry in adapter.head.parts.items():
        kept_name = entry.name.removeprefix(PREFIX)
        owner = kept_name.partition(".base_layer.")[0]
        head[kept_name if owner in adapted else name] = adapter.head[name]
    return head


def _next_steps(out: Path, adapter: AdapterFile) -> list[str]:
    """What can be done with it, as commands."""
    here, base = quote(str(out)), "" if adapter.base_name else " base=BASE"
    folders = (adapter.folder, adapter.folder.parent)
    noted = adapter.method.get("recipe")  # of a file of somebody's own, only its name
    named = noted if noted in choices("recipe", [recipes_dir()]) else "NAME"
    recipe = next((str(f / run_folder.CONFIG) for f in folders if run_folder.is_run(f)), named)
    return [
        f"  out         {out}",
        "next:",
        f"  dora-eval checkpoint={here} recipe={quote(str(recipe))}{base}",
        f"  dora-merge checkpoint={here}{base} out={quote(f'{out}-merged')}",
    ]


def _numbers(values: Tensor) -> list[float]:
    """In six digits: a large model has tens of thousands."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
