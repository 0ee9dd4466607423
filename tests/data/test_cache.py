"""What was tokenised once is not again, and no state of the cache, its folder or its rivals changes a token."""

import os
import threading
from pathlib import Path

import pytest
import torch

from dora_cli.data import cache, tokens
from dora_cli.data.cache import cache_folder, cached
from dora_cli.data.tokens import tokenize

KEY = "0123456789abcdef" * 4
OTHER = KEY[::-1]


def made(n=5):
    return {"input_ids": torch.arange(n, dtype=torch.int32), "offsets": torch.tensor([0, n])}


def blocks(n=5):
    """The same, in two stretches."""
    whole = made(n)
    for part in (slice(0, 1), slice(1, None)):
        yield {name: tensor[part] for name, tensor in whole.items()}


def never():
    raise AssertionError("made again")


def same(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a" / "tokens"


@pytest.fixture
def entry(folder):
    """A file that was kept."""
    cached(folder, lambda: KEY, blocks)
    return folder / f"{KEY}.safetensors"


# ---- tensors under a key ---------------------------------------------------------------------------------------------


def test_what_was_made_once_is_not_made_again(folder, entry):
    assert same(cached(folder, lambda: KEY, never), made())
    assert same(cached(folder, lambda: OTHER, lambda: blocks(3)), made(3))
    assert len(list(folder.iterdir())) == 2


def test_without_a_folder_it_is_made_and_nobody_asks_for_a_key(tmp_path):
    assert same(cached(None, never, blocks), made())


def test_writing_into_what_was_read_changes_no_file(folder, entry):
    before = entry.read_bytes()
    cached(folder, lambda: KEY, never)["input_ids"].zero_()
    assert entry.read_bytes() == before
    assert same(cached(folder, lambda: KEY, never), made())


def test_what_was_read_outlives_its_file(folder, entry):
    tensors = cached(folder, lambda: KEY, never)
    entry.unlink()
    assert same(tensors, made())


def test_no_flipped_byte_is_believed(folder, entry):
    whole = entry.read_bytes()
    for place in range(len(whole)):
        entry.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        assert same(cached(folder, lambda: KEY, blocks), made()), place
        assert same(cached(folder, lambda: KEY, never), made()), place  # and it is whole again


def test_no_file_of_another_length_is_believed(folder, entry):
    whole = entry.read_bytes()
    for length in range(len(whole)):
        entry.write_bytes(whole[:length])
        assert same(cached(folder, lambda: KEY, blocks), made()), length
        assert same(cached(folder, lambda: KEY, never), made()), length
    entry.write_bytes(whole + b"\0")
    assert same(cached(folder, lambda: KEY, blocks), made())


def test_a_file_under_another_name_is_not_believed(folder, entry):
    cached(folder, lambda: OTHER, lambda: blocks(3))
    (folder / f"{OTHER}.safetensors").replace(entry)
    assert same(cached(folder, lambda: KEY, blocks), made())
    assert same(cached(folder, lambda: KEY, never), made())


def test_a_folder_in_the_place_of_a_file_is_no_error(folder):
    (folder / f"{KEY}.safetensors").mkdir(parents=True)
    assert same(cached(folder, lambda: KEY, blocks), made())
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert same(cached(tmp_path / "file" / "tokens", lambda: KEY, blocks), made())


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", half)
    assert same(cached(folder, lambda: KEY, blocks), made())
    assert list(folder.iterdir()) == []


def test_a_kill_before_the_end_leaves_no_file_of_that_name(folder, monkeypatch):
    def kill(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        cached(folder, lambda: KEY, blocks)
    assert not (folder / f"{KEY}.safetensors").exists()


def test_many_may_race_for_one_file(folder):
    barrier, results = threading.Barrier(8), []

    def race():
        barrier.wait()
        results.append(cached(folder, lambda: KEY, lambda: blocks(1000)))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(same(result, made(1000)) for result in results)
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.safetensors"]


def test_what_was_not_used_for_longest_makes_room(folder, monkeypatch):
    keys = [f"{i:064x}" for i in range(5)]
    for age, key in enumerate(keys[:4]):
        cached(folder, lambda key=key: key, blocks)
        os.utime(folder / f"{key}.safetensors", (age, age))
    (folder / f".{KEY}.tmp-1_ab").write_bytes(bytes(500))  # of a process that was killed long ago
    os.utime(folder / f".{KEY}.tmp-1_ab", (0, 0))
    (folder / "weights.safetensors").write_bytes(bytes(5000))  # not ours
    os.utime(folder / "weights.safetensors", (0, 0))
    size = (folder / f"{keys[0]}.safetensors").stat().st_size
    monkeypatch.setattr(cache, "_limit", lambda folder: 3 * size)

    cached(folder, lambda: keys[0], never)  # used: now the youngest
    cached(folder, lambda: keys[4], blocks)
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"weights.safetensors", *(f"{keys[i]}.safetensors" for i in (0, 3, 4))}


def test_where_it_lies(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder("auto") == Path("/elsewhere/dora_cli/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path("/home/someone/.cache/dora_cli/tokens")
    assert cache_folder("~/mine") == Path("/home/someone/mine/tokens")
    assert cache_folder(None) is None and cache_folder("false") is None


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def encode(folder, new_tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "CACHED_FROM", 0)

    def encode(tokenizer=None, texts=("w1 w2", "w3"), pairs=("w4", "w5 w6"), max_length=8, **scalars):
        pairs = pairs and list(pairs)
        tokenizer = tokenizer or new_tokenizer("bert")
        return tokenize(list(texts), pairs, tokenizer, max_length=max_length, scalars=scalars, cache=folder)

    return encode


def test_a_second_run_has_the_same_tokens_without_tokenising(encode, monkeypatch):
    texts = ["w1 w2", "w1 " * 20, ""]
    first = encode(texts=texts, pairs=None)
    monkeypatch.setattr(tokens._Job, "tokens", never)
    second = encode(texts=texts, pairs=None, labels=torch.tensor([1, 0, 1]))
    assert same(first.ragged, second.ragged) and torch.equal(first.offsets, second.offsets)
    assert second.truncated == first.truncated == 1
    assert second.batch([2, 1])["labels"].tolist() == [1, 0]
    assert torch.equal(first.batch([0, 1])["input_ids"], second.batch([0, 1])["input_ids"])


def test_what_changes_no_token_changes_no_key(encode, new_tokenizer, monkeypatch):
    encode()
    monkeypatch.setattr(tokens._Job, "tokens", never)
    tokenizer = new_tokenizer("bert", padding_side="left", model_max_length=99)
    tokenizer(["w1 w2 w3"], truncation=True, max_length=3, padding="max_length")
    assert encode(tokenizer, labels=torch.tensor([1, 2])).side == "left"


def with_a_word_more(make):
    tokenizer = make("bert")
    tokenizer.add_tokens(["new"])
    return tokenizer


def without_types(make):
    tokenizer = make("bert")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


OTHERS = {
    "another word": {"texts": ("w1 w2", "w4")},
    "a border that moved": {"texts": ("w1 ", "w2w3")},
    "a word that moved": {"texts": ("w1 w2", "w3w4"), "pairs": ("", "w5 w6")},
    "another order": {"texts": ("w3", "w1 w2")},
    "texts the other way round": {"texts": ("w4", "w5 w6"), "pairs": ("w1 w2", "w3")},
    "no second texts": {"pairs": None},
    "second texts as first": {"texts": ("w1 w2", "w3", "w4", "w5 w6"), "pairs": None},
    "a row more": {"texts": ("w1 w2", "w3", ""), "pairs": ("w4", "w5 w6", "")},
    "another length": {"max_length": 9},
    "another tokenizer": {"tokenizer": lambda make: make("plain")},
    "another vocabulary": {"tokenizer": with_a_word_more},
    "another side to cut": {"tokenizer": lambda make: make("bert", truncation_side="left")},
    "no token types": {"tokenizer": without_types},
    "special tokens as text": {"tokenizer": lambda make: make("bert", split_special_tokens=True)},
    "another token for nothing": {"tokenizer": lambda make: make("bert", eos_token="[EOS]")},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_may_change_a_token_changes_the_key(encode, folder, new_tokenizer, what):
    encode()
    options = dict(OTHERS[what])
    if "tokenizer" in options:
        options["tokenizer"] = options["tokenizer"](new_tokenizer)
    encode(**options)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_another_version_of_a_library_changes_the_key(encode, folder, monkeypatch, library):
    encode()
    monkeypatch.setattr(f"{library}.__version__", "0.0")
    encode()
    assert len(list(folder.iterdir())) == 2


def test_a_small_set_is_not_kept(encode, folder, monkeypatch):
    monkeypatch.setattr(tokens, "CACHED_FROM", 15)
    encode()  # 14 characters
    assert not folder.exists()
    encode(texts=("w1 w2", "w3 "))
    assert len(list(folder.iterdir())) == 1
