"""What is written aside appears whole or not at all."""

import json

import pytest

from mixmae.writing import write_json, writing, writing_table


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "table.csv"
    with writing(target) as partial:
        partial.write_text("half")
        assert partial.suffix == ".csv"
        assert partial.name.startswith(".")
        assert not target.exists()
    assert target.read_text() == "half"
    assert [path.name for path in target.parent.iterdir()] == ["table.csv"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")

    def fail_half_way() -> None:
        with writing(target) as partial:
            partial.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    target = tmp_path / "hub"
    for name in ("old", "new"):
        with writing(target) as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_nothing_is_overwritten_unless_it_may_be(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="is there already"), writing(tmp_path / "a.json", overwrite=False):
        pass
    write_json(tmp_path / "a.json", {"b": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}


def test_a_table_appears_when_it_is_whole(tmp_path):
    with writing_table(tmp_path / "a.csv") as table:
        table.writerow(["name", 1, "a,b"])
        table.writerow([b"\xff".decode(errors="surrogateescape")])
        assert not (tmp_path / "a.csv").exists()
    assert (tmp_path / "a.csv").read_bytes() == b'name,1,"a,b"\r\n\xff\r\n'
