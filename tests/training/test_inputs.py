"""What a name on the command line stands for."""

from pathlib import Path

import pytest

from lookup_experts.errors import UserError
from lookup_experts.training.inputs import find_inputs


def found(names: list[Path], out: Path) -> list[str]:
    return [source.name for source in find_inputs([str(name) for name in names], out)]


def test_folders_are_walked_in_sorted_order(tmp_path):
    text = tmp_path / "text"
    for name in ("b.txt", "a/z.md", "a/b/c.txt.gz", "a/c.py", ".git/x.txt", "a/.x.txt", "d.exe"):
        path = text / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    expected = [text / "b.txt", text / "a/c.py", text / "a/z.md", text / "a/b/c.txt.gz"]
    assert found([text], tmp_path / "out") == [str(path) for path in expected]


@pytest.mark.parametrize("name", ["nope.txt", "/nope", "./nope", "a/b/c", "no pe", "a.jsonl.gz"])
def test_what_can_only_be_a_file_must_exist(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} not found: there is no such file or folder"):
        find_inputs([name], tmp_path)


def test_a_name_that_is_neither_file_nor_data_set(tmp_path):
    with pytest.raises(UserError, match="nope is no file or folder here, and no data set"):
        find_inputs(["nope"], tmp_path)


def test_an_unknown_ending_names_the_known(tmp_path):
    path = tmp_path / "a.pdf"
    path.touch()
    with pytest.raises(UserError, match=r"unknown file type\. Known endings: \.txt, .*\.parquet"):
        find_inputs([str(path)], tmp_path / "out")


def test_a_folder_without_text(tmp_path):
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match="has no text in it"):
        find_inputs([str(tmp_path / "text")], tmp_path / "out")


def test_an_input_given_twice(tmp_path):
    path = tmp_path / "text" / "a.txt"
    path.parent.mkdir()
    path.touch()
    with pytest.raises(UserError, match=r"a\.txt is given twice"):
        found([path.parent, path], tmp_path / "out")


def test_out_must_not_lie_in_what_is_read(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"lies in .* Choose a folder outside"):
        found([tmp_path], tmp_path / "out")
