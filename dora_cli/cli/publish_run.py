"""What goes out: the model card beside an adapter or a merged model, and the upload to the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError, safe_load

from dora_cli.checkpoints.adapter_format import CONFIG, METHOD
from dora_cli.checkpoints.atomic import atomic_write_text
from dora_cli.checkpoints.json_io import read_json
from dora_cli.checkpoints.serving import max_lora_rank, obstacles
from dora_cli.cli import run_folder
from dora_cli.cli.run import FAILURE, print_error
from dora_cli.config.record import recipe_of, words_of
from dora_cli.errors import UserError
from dora_cli.reporting.card import NAME, PLACEHOLDER, Facts, adapter_card, merged_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from dora_cli.checkpoints.merge import MergeReport
    from dora_cli.training.setup import Composed

NOT_UPLOADED = ["manifest.json", "merge.json"]  # they speak of this machine; the hub has hashes of its own


def write_run_cards(composed: "Composed", summary: Mapping[str, Any], out: Path) -> None:
    """Write the cards of a run's adapter, and of its merged model where there is one."""
    run, words = safe_load(composed.yaml), words_of(composed.yaml)
    facts = _facts(out / run_folder.ADAPTER, summary, run, words, composed.config.push_to_hub)
    _write(out / run_folder.ADAPTER, adapter_card(facts))
    if (out / run_folder.MERGED).is_dir():
        _write(out / run_folder.MERGED, merged_card(facts))


def write_compressed_card(folder: Path, source: Path, done: str) -> None:
    """Write the card of a compressed adapter. Metrics were measured before, so there are none.

    Args:
        source: the folder of the adapter that it was made from.
        done: the sentence that says what was done.
    """
    run = _of_run(source.absolute().parent)[1]
    _write(folder, adapter_card(_facts(folder, {}, run, [], None), done))


def merge_card(report: "MergeReport", repository: str | None) -> str:
    """The card of a merged model, from the run that its adapter is of where it lies in one.

    Of several adapters, task and class are those of the one that gives the head, and the data is everyone's.
    """
    folder, base = report.owner, {"base_model_name_or_path": report.base_name}
    summary, run, words = _of_run(folder.parent)
    if report.combination:
        c = report.combination
        rest = "" if c.how == "linear" else f", density {c.density:g}"
        made_of = [f"combined by `{c.how}` with the weights {', '.join(f'{w:g}' for w in c.weights)}{rest}"]
        run = {key: run[key] for key in ("data", "model") if key in run}
        others = [_of_run(adapter.parent)[1] for adapter in report.adapters]
        facts = Facts(base, run=run, others=others, repository=repository)
    else:
        made_of, facts = [], Facts(base, _method(folder), summary, run, words, repository=repository)
    return merged_card(facts, made_of)


def _facts(
    folder: Path, summary: Mapping[str, Any], run: Mapping[str, Any], words: Sequence[str], repository: str | None
) -> Facts:
    adapter = read_json(folder / CONFIG)
    served = adapter.get("peft_type") == "LORA" and not obstacles(folder)
    return Facts(
        adapter=adapter,
        method=_method(folder),
        summary=summary,
        run=run,
        words=words,
        max_lora_rank=max_lora_rank(adapter["r"]) if served else None,
        repository=repository,
    )


def _method(folder: Path) -> dict[str, Any]:
    return read_json(folder / METHOD) if (folder / METHOD).is_file() else {}


def _of_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Summary, configuration and command of the run in a folder; empty where there is none."""
    try:
        text = (folder / run_folder.CONFIG).read_text(encoding="utf-8")
        if recipe_of(text) is None:  # somebody else's file of that name
            return {}, {}, []
        return read_json(folder / run_folder.SUMMARY), safe_load(text), words_of(text)
    except (OSError, UnicodeDecodeError, YAMLError, UserError):  # a card with less in it is no reason to fail
        return {}, {}, []


def _write(folder: Path, text: str) -> None:
    """Beside the files that the folder's manifest lists: a card may be edited."""
    atomic_write_text(folder / NAME, text)


def require_hub(repository: str, private: bool | None, *, offline: bool = False) -> str:
    """Refuse, before anything is done, an upload that can't succeed.

    Returns:
        The repository's full name, ``OWNER/NAME``.

    Raises:
        UserError: no name, the network is not to be used, there is no token, the hub does not take it, or the
            repository is there and shows itself to others than ``private`` says.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    asked = f"push_to_hub={repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(f"{asked} is no name of a repository", hint="such as NAME, or OWNER/NAME") from None
    if offline or is_offline_mode():
        why = "offline=true" if offline else "HF_HUB_OFFLINE is set"
        raise UserError(f"{asked} needs the network, and {why}", hint="leave one of the two out")
    login = "hf auth login, or set HF_TOKEN, with a token that may write"
    if get_token() is None:
        raise UserError(f"{asked}: there is no token for the hub", hint=login)
    api = HfApi()
    try:
        owner = api.whoami()["name"]
        full = repository if "/" in repository else f"{owner}/{repository}"
        _require_visibility(api, full, private)
    except RepositoryNotFoundError:  # it will be made
        pass
    except UserError:
        raise
    except Exception as error:  # refused, or no network: httpx's own errors and the hub's
        raise UserError(
            f"{asked}: the hub does not answer to this token", where=_first_line(error), hint=login
        ) from None
    return full


def _require_visibility(api: "HfApi", repository: str, private: bool | None) -> None:
    """Refuse a repository that is not as private as it should be: who uploads to one that is there can't change that.

    Raises:
        UserError: naming it. Whatever the hub says where there is none, or no answer.
    """
    if private is not None and bool(api.repo_info(repository).private) != private:
        raise UserError(
            f"hub.private={str(private).lower()}, and {repository} is {'public' if private else 'private'} already",
            hint="change that in its settings on the hub, leave hub.private out, or name another repository",
        )


def upload(folder: Path, repository: str, private: bool | None) -> int:
    """Upload a folder to the hub, where a repository is made if there is none. Returns the exit code.

    A card that was written before the repository's name was known gets it. A failure is a message, never an
    exception: what was saved is not touched.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        _require_visibility(api, url.repo_id, private)
        _name_in_card(folder / NAME, url.repo_id)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Upload by dora_cli",
            ignore_patterns=[".*", *NOT_UPLOADED],
        )
    except UserError as error:
        print_error(f"{folder} was not uploaded; it is saved", error.message, error.hint)
        return FAILURE
    except Exception as error:  # whatever it is, all is saved
        flags = [*(f"--exclude {name}" for name in NOT_UPLOADED), *(["--private"] if private else [])]
        later = f"hf upload {repository} {folder} . {' '.join(flags)}"
        print_error(f"{folder} was not uploaded; it is saved", _first_line(error), f"later: {later}")
        return FAILURE
    print(f"uploaded to {url}")
    base = read_json(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None
    if isinstance(base, str) and Path(base).is_dir():
        print(f"its {CONFIG} names the base by a folder of this machine, {base}: others have to name their own")
    return 0


def _name_in_card(card: Path, repository: str) -> None:
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if PLACEHOLDER in text:
        atomic_write_text(card, text.replace(PLACEHOLDER, repository))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
