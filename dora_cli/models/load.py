"""A base model and its tokenizer: from the hub, a folder, or a folder inside an installed package."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dora_cli.errors import UserError
from dora_cli.models.names import PLACES, resolve_name
from dora_cli.models.new_tokens import NewTokens, add_tokens
from dora_cli.models.quantised import (
    STORED,
    Quantised,
    loading_options,
    quieten,
    require_package,
    settle,
    stored_package,
)
from dora_cli.models.skeleton import can_hold, outside_base, skeleton

# What transformers raises about weights that it can't find or read; anything else there is a fault of the code.
FILE_ERRORS = (OSError, ValueError, ImportError, LookupError)


class ModelChoice(Protocol):
    """What this room reads of ``config.schema.ModelConfig``."""

    name: str
    revision: str | None
    trust_remote_code: bool
    quantization: str | None
    add_tokens: list[str]


@dataclass
class LoadedModel:
    """What ``load_model`` gives.

    Attributes:
        model: float32 unless asked for as it is stored, on the CPU, in evaluation mode, nothing frozen yet.
        tokenizer: always with a pad token.
        missing: names of the parameters that the checkpoint did not provide (another shape counts as not provided),
            in model order. They hold random numbers.
        head_modules: modules to train and save in full, in model order; they cover ``missing`` (see ``find_heads``).
        source: what the weights were read from: an absolute folder, or the hub name.
        new_tokens: what ``model.add_tokens`` came to; null without it.
        quantised: which weights are packed, by ``model.quantization`` or in the folder; null where none is.
        hollow: whether the model has shapes but no numbers (it is on the meta device).
    """

    model: Any
    tokenizer: Any
    missing: list[str]
    head_modules: list[str]
    source: str
    new_tokens: NewTokens | None = None
    quantised: Quantised | None = None
    hollow: bool = False


def load_model(
    config: ModelChoice,
    *,
    auto_class: str,
    offline: bool,
    max_length: int | None = None,
    max_target_length: int | None = None,
    as_stored: bool = False,
    device: torch.device | str = "cpu",
    for_plan: bool = False,
    **model_kwargs: Any,
) -> LoadedModel:
    """Load a model for a task, in float32 or as it is stored, with its tokenizer.

    New parameters are drawn from torch's global generator: seed it first. Weights are read from safetensors only, and
    no code that comes with the model is run unless ``config.trust_remote_code``.

    Args:
        config: name, revision, trust_remote_code, quantization, add_tokens.
        auto_class: name of transformers' class for the task, e.g. ``AutoModelForSequenceClassification``.
        offline: read local folders and the hub's cache only; nothing reaches for the network.
        max_length: the longest input that will be given, in tokens; checked against the learned positions.
        max_target_length: the longest text that a decoder will be given, likewise; ``None``: no longer than that.
        as_stored: keep the type in which the weights are stored: half the memory for a base that is frozen anyway.
        device: where a base is packed, and stays; one that is not is loaded on the CPU.
        for_plan: nothing will be computed: weights that are not here, or larger than this machine's memory, are not
            read, and the model is ``hollow``; its ``missing`` are then all parameters outside the base model.
        model_kwargs: what the task adds to the model's configuration, e.g. ``num_labels``.

    Raises:
        UserError: the model can't be found, is damaged, has no such head, lacks more than a head, has no tokenizer, or
            takes shorter inputs than ``max_length``; it can't be packed as asked, or is packed already.
    """
    quieten()
    if config.quantization:
        require_package(config.quantization)
    import transformers

    source = resolve_name(config.name, weights=not for_plan)
    hollow = for_plan and not can_hold(source, config.revision)
    shared = {
        "revision": config.revision or "main",
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": offline,
    }
    auto = getattr(transformers, auto_class)
    with _quiet(), _network(allowed=not offline):
        # A damaged JSON file may raise anything, the tokenizer's reader a bare Exception.
        with _failures_named(config.name, source, offline, (Exception,)):
            settings = transformers.AutoConfig.from_pretrained(source, **shared, **model_kwargs)
            _require_class(auto, auto_class, settings, config.name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared)
            kind, compute = _packing(config, settings), torch.bfloat16 if as_stored else torch.float32
            trusted = config.trust_remote_code
            packing = {}
            if kind and not hollow:
                packing = loading_options(kind, auto, settings, compute, str(device), trust_remote_code=trusted)
        # Packed weights that do not fit are met by whatever can't be done with them.
        kinds = (*FILE_ERRORS, RuntimeError) if kind == STORED else FILE_ERRORS
        with _failures_named(config.name, source, offline, kinds):
            if hollow:
                model = skeleton(auto, settings, as_stored, config.trust_remote_code)
                absent, quantised = outside_base(model), None
            else:
                model, report = auto.from_pretrained(
                    source,
                    config=settings,
                    dtype="auto" if as_stored else torch.float32,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **packing,
                    **shared,
                )
                absent = set(report["missing_keys"]) | {key[0] for key in report["mismatched_keys"]}
                quantised = settle(model, kind, compute, config.name) if kind else None
    missing = [name for name, _ in model.named_parameters() if name in absent]
    _refuse_unfit(model, missing, config.name)
    _fit_tokenizer(model, tokenizer, config.name)
    with _quiet():
        new = add_tokens(model, tokenizer, config.add_tokens, config.name) if config.add_tokens else None
    window = position_limit(model)
    for key, length in (("data.max_length", max_length), ("data.max_target_length", max_target_length)):
        if length is not None and window is not None and length > window:
            raise UserError(
                f"{key}={length} is more than the {window} positions of {config.name}",
                hint=f"set {key} to {window} or less",
            )
    return LoadedModel(model.eval(), tokenizer, missing, find_heads(model, missing), source, new, quantised, hollow)


def _packing(config: ModelChoice, settings: Any) -> str | None:
    """How the weights are packed: as asked, ``stored`` where they are in the folder, None where they are not."""
    stored = stored_package(settings, config.name)
    if stored and config.quantization:
        raise UserError(
            f"model.quantization={config.quantization}: the weights of {config.name} are stored quantised already",
            where=f"by {stored}",
            hint="leave model.quantization out: they are used as they are stored; or name the original",
        )
    return STORED if stored else config.quantization


def find_heads(model: Any, missing: list[str]) -> list[str]:
    """The modules to train in full: the task's head, and whatever else the checkpoint did not provide.

    A task's head is what lies outside the base model, also where the checkpoint has one (a model that was fine-tuned
    before); a language-model head is none, since it belongs to the pretrained model. Names are those of the largest
    modules without any other parameter, e.g. ``classifier`` of RoBERTa, ``score`` of GPT-2, ``bert.pooler`` where a
    checkpoint has no pooler.
    """
    trained = set(missing) | outside_base(model)
    heads: list[str] = []
    for name, module in model.named_modules():
        parameters = {f"{name}.{p}" for p, _ in module.named_parameters()}
        if name and parameters and parameters <= trained and not _inside(name, heads):
            heads.append(name)
    partly = {name.rpartition(".")[0] for name in trained if not _inside(name, heads)} - {""}
    return [name for name, _ in model.named_modules() if name in partly or name in heads]


def position_limit(model: Any) -> int | None:
    """The longest input in tokens that the learned absolute positions allow; ``None`` for other kinds of positions."""
    table = _position_table(model)
    if table is None:
        return None
    positions: int = model.config.max_position_embeddings
    # RoBERTa counts positions from its padding index + 1.
    return positions if table.padding_idx is None else positions - table.padding_idx - 1


def _position_table(model: Any) -> nn.Embedding | None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        # OPT and BART keep two rows more than they can use; relative and rotary positions have no such table.
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings in (positions, positions + 2)
        if is_table and module is not words and ("position" in name.rpartition(".")[2] or name.endswith("wpe")):
            return module
    return None


def _require_class(auto: Any, auto_class: str, settings: Any, name: str) -> None:
    if type(settings) not in auto._model_mapping and auto_class not in (getattr(settings, "auto_map", None) or {}):
        task = auto_class.removeprefix("AutoModelFor")
        such = " (an encoder-decoder such as BART or T5)" if task == "Seq2SeqLM" else ""
        raise UserError(
            f"model.name={name}: transformers has no {task} model of type '{settings.model_type}'",
            hint=f"choose another model{such} or another data.task",
        )
    if auto_class == "AutoModelForCausalLM" and settings.is_encoder_decoder:
        raise UserError(
            f"model.name={name} is an encoder-decoder, of which a language model would be half",
            hint="choose a decoder (Llama, Qwen, GPT-2, …), or data.task=summarization",
        )
    if auto_class == "AutoModelForCausalLM" and _reads_ahead(settings):
        raise UserError(
            f"model.name={name} is an encoder: it would see the tokens that it has to predict",
            hint="choose a decoder (Llama, Qwen, GPT-2, …)",
        )


def _reads_ahead(settings: Any) -> bool:
    """Whether a language model of these settings sees what follows a token, as BERT and its kin do.

    GPT-NeoX says that it is no decoder, too, but has no class for masked words.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(settings) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(settings, "is_decoder", True)


def _refuse_unfit(model: Any, missing: list[str], name: str) -> None:
    """Only a head may be new: layers and embeddings of random numbers mean a wrong or damaged checkpoint."""
    base = {id(p) for p in model.base_model.parameters()}
    body = [f"{n}." for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Embedding))]
    parameters = dict(model.named_parameters())
    lost = [n for n in missing if id(parameters[n]) in base and n.startswith(tuple(body))]
    if lost:
        hint = "only a head may be new; config.json and the weights must belong together"
        if base <= {id(parameters[n]) for n in missing}:
            # LlamaForQuestionAnswering and its kin look for transformer.layers where the checkpoint has model.layers.
            hint += ". Where they do, save the model without its head, which fits every class: "
            hint += (
                "AutoModel.from_pretrained(NAME).save_pretrained(DIR), and the tokenizer beside it; then model.name=DIR"
            )
        raise UserError(
            f"model.name={name}: its weights do not fit {type(model).__name__}",
            where=f"{len(lost)} parameters of the base model are absent or have another shape, e.g. {lost[0]}",
            hint=hint,
        )


def _fit_tokenizer(model: Any, tokenizer: Any, name: str) -> None:
    # Without vocabulary files transformers builds a tokenizer of nothing but special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
        raise UserError(
            f"model.name={name}: there is no tokenizer beside the model",
            hint="the folder must also hold tokenizer.json (or the vocabulary files of its tokenizer)",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model.name={name}: its tokenizer has {len(tokenizer)} tokens, the model's embedding only {rows}",
            hint="tokenizer and weights must belong together",
        )
    # Token types are for models that tell two texts apart by them; GPT-2 would add them up as words.
    if getattr(model.config, "type_vocab_size", 0) < 2:
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model.name={name}: its tokenizer has neither a pad token nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    table = _position_table(model)
    if table is not None and table.padding_idx not in (None, tokenizer.pad_token_id):
        raise UserError(
            f"model.name={name}: its tokenizer pads with token {tokenizer.pad_token_id}, "
            f"but the model counts positions by padding of token {table.padding_idx}",
            hint="tokenizer and weights must belong together",
        )
    # Decoder classifiers read the last token that is not this one.
    model.config.pad_token_id = tokenizer.pad_token_id


def _inside(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, warnings or load report of transformers: the terminal belongs to our own view."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _network(*, allowed: bool) -> Iterator[None]:
    """Make the hub's client refuse every request; ``local_files_only`` alone leaves some look-ups."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _failures_named(name: str, source: str, offline: bool, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what is raised about a model that can't be read into one message."""
    from safetensors import SafetensorError

    try:
        yield
    except (UserError, MemoryError):
        raise
    except SafetensorError as error:
        raise UserError(f"model.name={name}: its weights are damaged", where=_cause(error)) from error
    except kinds as error:
        if "trust_remote_code" in str(error):
            hint = "model.trust_remote_code=true runs the Python code that comes with the model: only if you trust it"
        elif _is_gated(error):
            raise UserError(
                f"model.name={name}: its owner asks for a licence to be accepted, or the model is private",
                where=_cause(error),
                hint=f"ask for access at https://huggingface.co/{source}, then log in once with `hf auth login`",
            ) from error
        elif Path(source).is_dir():
            hint = "configuration, tokenizer and weights must be whole, as transformers' save_pretrained() leaves them"
        elif offline:
            hint = "offline=true reads only folders and what the hub's cache holds: fetch it once without offline=true"
        else:
            hint = f"check the name and the connection; {PLACES}"
        raise UserError(f"model.name={name} can't be loaded", where=_cause(error), hint=hint) from error


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub said that access must be granted first; transformers wraps what its client raises."""
    while error is not None:
        if type(error).__name__ == "GatedRepoError" or "gated repo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:2])[:300] if lines else "no reason given"
    return f"{type(error).__name__}: {told}" if isinstance(error, LookupError) or not lines else told
