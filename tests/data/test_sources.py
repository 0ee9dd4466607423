"""Roles find their splits, what is held out or cut is decided by the seed, and every row knows where it came from."""

import json
import socket

import pytest

from dora_cli.data.sources import ROW, load_rows
from dora_cli.errors import UserError


def lines(n, start=0):
    return "".join(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(start, start + n))


def load(config, seed=1, **options):
    return load_rows(config, offline=True, seed=seed, **options)


def texts(rows, role):
    return rows.splits[role]["text"][:]


@pytest.fixture
def folder(write):
    write("set/train.jsonl", lines(8))
    write("set/validation.csv", "text,label\nv0,0\nv1,1\nv2,0\n")
    write("set/README.md", "not data")
    return write("set/test.jsonl", lines(2, 100)).parent


def test_a_folder_gives_train_and_validation_and_no_test(choose, folder):
    rows = load(choose(path=folder))
    assert list(rows.splits) == ["train", "validation"]
    assert texts(rows, "train") == [f"t{i}" for i in range(8)]
    assert texts(rows, "validation") == ["v0", "v1", "v2"]
    assert rows.origin == {"train": folder / "train.jsonl", "validation": folder / "validation.csv"}
    assert rows.notes == []


def test_a_role_that_is_asked_for_is_read_alone(choose, folder):
    rows = load(choose(path=folder), roles=["test"])
    assert {role: texts(rows, role) for role in rows.splits} == {"test": ["t100", "t101"]}
    with pytest.raises(UserError, match="no 'dev' split") as caught:
        load(choose(path=folder), roles=["dev"])
    assert "train, validation" in caught.value.where
    assert "data.splits.dev=NAME" in caught.value.hint


@pytest.mark.parametrize("name", ["dev", "dev.jsonl"])
def test_splits_have_the_names_that_the_user_gives(choose, write, name):
    write("set/tr.jsonl", lines(4))
    path = write("set/dev.jsonl", lines(2, 50)).parent
    rows = load(choose(path=path, splits={"train": "tr", "validation": name}))
    assert len(rows.splits["train"]) == 4 and texts(rows, "validation") == ["t50", "t51"]


def test_a_mapped_name_that_is_absent_falls_back_to_the_role(choose, folder):
    splits = {"validation": "validation_matched", "validation_mismatched": "validation_mismatched"}
    rows = load(choose(path=folder, splits=splits))
    assert list(rows.splits) == ["train", "validation"]
    assert rows.notes == [f"no split 'validation_mismatched' in {folder}: not evaluated"]


def test_a_further_role_can_be_given_up(choose, folder):
    rows = load(choose(path=folder, splits={"validation": "", "validation_mismatched": ""}))
    assert list(rows.splits) == ["train", "validation"] and rows.notes == []


def test_a_mapped_name_that_is_there_wins_over_the_role(choose, write, folder):
    write("set/validation_matched.jsonl", lines(5, 20))
    write("set/validation_mismatched.jsonl", lines(6, 40))
    splits = {"validation": "validation_matched", "validation_mismatched": "validation_mismatched"}
    rows = load(choose(path=folder, splits=splits))
    assert {role: len(split) for role, split in rows.splits.items()} == {
        "train": 8,
        "validation": 5,
        "validation_mismatched": 6,
    }


def test_validation_is_held_out_of_train_by_the_seed(choose, write):
    config = choose(path=write("one.jsonl", lines(40)))
    first, same, other = load(config), load(config), load(config, seed=2)
    held = texts(first, "validation")
    assert len(held) == 10
    assert sorted(held + texts(first, "train")) == sorted(f"t{i}" for i in range(40))
    assert texts(same, "validation") == held != texts(other, "validation")
    assert first.notes == ["no validation split: 10 of 40 training rows held out by seed 1"]
    assert first.held_out == 10


def test_the_held_out_rows_can_be_read_alone(choose, write):
    config = choose(path=write("one.jsonl", lines(40)))
    both, alone = load(config), load(config, roles=["validation"])
    assert list(alone.splits) == ["validation"]
    assert texts(alone, "validation") == texts(both, "validation")


def test_a_single_file_can_be_the_split_itself(choose, write):
    rows = load(choose(path=write("mine.csv", "text,label\na,0\nb,1\n")), roles=["validation"], file_role="validation")
    assert texts(rows, "validation") == ["a", "b"] and rows.notes == []


def test_cuts_shuffle_train_by_the_seed_and_keep_the_order_of_validation(choose, folder):
    config = choose(path=folder, max_train_samples=5, max_eval_samples=2)
    first, same, other = load(config), load(config), load(config, seed=2)
    assert texts(first, "validation") == ["v0", "v1"]
    cut = texts(first, "train")
    assert len(set(cut)) == 5 and cut == texts(same, "train") != texts(other, "train")
    assert cut != [f"t{i}" for i in range(5)]
    assert first.notes == ["train: 5 of 8 rows", "validation: 2 of 3 rows"]


def test_a_cut_longer_than_the_split_changes_nothing(choose, folder):
    rows = load(choose(path=folder, max_train_samples=100))
    assert texts(rows, "train") == [f"t{i}" for i in range(8)] and rows.notes == []


def test_every_row_remembers_its_line_through_holdout_and_cut(choose, write):
    path = write("one.jsonl", "\n" + lines(40))  # line 1 is blank
    rows = load(choose(path=path, max_train_samples=7))
    for role, split in rows.splits.items():
        for i, row in enumerate(split):
            assert row["text"] == f"t{row[ROW]}"
            assert rows.where(role, i) == f"{path}, line {row[ROW] + 2}"


def test_a_saved_data_set_is_read(choose, tmp_path):
    import datasets

    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    datasets.DatasetDict({"train": made, "validation": made.select([1])}).save_to_disk(str(tmp_path / "many"))
    rows = load(choose(path=tmp_path / "many"))
    assert texts(rows, "train") == ["a", "b"] and texts(rows, "validation") == ["b"]
    assert rows.where("validation", 0) == f"row 1 of 'validation' in {tmp_path / 'many'}"
    made.save_to_disk(str(tmp_path / "one"))
    assert {r: len(s) for r, s in load(choose(path=tmp_path / "one")).splits.items()} == {"train": 1, "validation": 1}


def test_a_damaged_saved_data_set_is_named(choose, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="saved data set is damaged"):
        load(choose(path=tmp_path / "one"))


def test_what_is_missing_is_named_beside_what_is_there(choose, write, folder, tmp_path):
    with pytest.raises(UserError, match="no such file or folder") as caught:
        load(choose(path=tmp_path / "sets"))
    assert "set" in caught.value.hint
    with pytest.raises(UserError, match="no such file or folder"):
        load(choose(path="nowhere/at/all.csv"))
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="no 'train' split") as caught:
        load(choose(path=folder))
    assert "test, validation" in caught.value.where
    write("empty/notes.txt", "x")
    with pytest.raises(UserError, match="holds no data files") as caught:
        load(choose(path=tmp_path / "empty"))
    assert "notes.txt" in caught.value.where
    with pytest.raises(UserError, match="there is no data"):
        load(choose())


def test_two_files_of_one_name_are_ambiguous(choose, write, folder):
    write("set/train.csv", "text,label\na,1\n")
    with pytest.raises(UserError, match=r"ambiguous: train\.csv and train\.jsonl"):
        load(choose(path=folder))


@pytest.mark.parametrize("content", ["text,label\n", ""])
def test_an_empty_split_is_refused(choose, write, folder, content):
    path = write("set/validation.csv", content)
    with pytest.raises(UserError, match="empty") as caught:
        load(choose(path=folder))
    assert str(path) in caught.value.where


def test_too_few_rows_to_hold_out_are_refused(choose, write):
    with pytest.raises(UserError, match="1 row, too few to hold out"):
        load(choose(path=write("one.csv", "text,label\na,1\n")))


def test_a_home_folder_is_expanded(choose, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load(choose(path="~/set")).splits["train"]) == 8


def test_path_beats_name(choose, folder):
    assert len(load(choose(path=folder, name="no/such-set")).splits["train"]) == 8


def test_offline_never_opens_a_connection(choose, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def connect(*_):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(UserError, match=r"data\.name=no-such/set \(sst2\) can't be loaded") as caught:
        load(choose(name="no-such/set", config="sst2"))
    assert "data.path" in caught.value.hint
    assert constants.HF_HUB_OFFLINE is False


def test_the_hubs_splits_get_the_same_rules(choose, monkeypatch):
    import datasets

    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    names = ("train", "validation_matched", "validation_mismatched", "test_matched")
    asked = []

    def hub(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict({name: made for name in names})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    splits = {"validation": "validation_matched", "validation_mismatched": "validation_mismatched"}
    rows = load(choose(name="nyu-mll/glue", config="mnli", splits=splits))
    assert asked == [("nyu-mll/glue", "mnli")]
    assert list(rows.splits) == ["train", "validation", "validation_mismatched"]
    assert rows.where("validation", 1) == "row 2 of 'validation' in nyu-mll/glue (mnli)"


def test_reading_prints_nothing_and_leaves_datasets_as_it_was(choose, folder, capfd):
    import datasets

    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    load(choose(path=folder))
    assert capfd.readouterr() == ("", "")
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
