import csv
import gzip
import hashlib
import json
import pickle

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftlora.data.config import DataConfig
from weftlora.data.read import Blocks, Lines, flat, read
from weftlora.errors import ConfigError, DataError

ROWS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "say,", "completion": '"a"\nb'}]
LETTER_BLOCKS = Blocks(lambda lines: [len(line) for line in lines], 10)


def read_file(path, content, **settings):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(path, DataConfig.parse({"train": str(path), **settings}), LETTER_BLOCKS)


def values(source):
    return [row.values for row in source.rows]


def as_csv(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    config = DataConfig.parse("unused")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    as_csv(tmp_path / "a.csv", ",")
    as_csv(tmp_path / "a.tsv", "\t")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "a_saved")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.ndjson").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "B.JSONL").write_bytes((tmp_path / "a.jsonl").read_bytes())
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_folder" / "part.csv").write_bytes((tmp_path / "a.csv").read_bytes())
    for path in tmp_path.iterdir():
        source = read(path, config, LETTER_BLOCKS)
        assert values(source) == ROWS, path
    raw = (tmp_path / "a.csv").read_bytes()
    path = str(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", config, LETTER_BLOCKS).hashes == {path: hashlib.sha256(raw).hexdigest()}


def test_rows_know_their_lines(tmp_path):
    assert [row.line for row in read_file(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n').rows] == [1, 3]
    assert [row.line for row in read_file(tmp_path / "a.json", '[\n {"a":\n 1},\n {"a": 2}]').rows] == [2, 4]
    assert [row.line for row in read_file(tmp_path / "a.csv", 'a,b\n1,"x\ny"\n2,z\n').rows] == [2, 4]


def test_blank_lines_are_counted(tmp_path):
    assert read_file(tmp_path / "a.jsonl", '\n{"a": 1}\n  \n{"a": 2}\n').blank == 2
    assert read_file(tmp_path / "a.csv", "a,b\n\n1,2\n").blank == 1
    assert read_file(tmp_path / "a.txt", "x\n\ny\n", unit="line").blank == 1


def test_a_byte_order_mark_and_foreign_line_ends_are_no_text(tmp_path):
    assert values(read_file(tmp_path / "a.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n")) == [{"a": "1", "b": "2"}]
    assert values(read_file(tmp_path / "a.txt", "x\r\ny\r\n", unit="line")) == [{"text": "x"}, {"text": "y"}]


def test_a_unicode_line_separator_does_not_end_a_json_line(tmp_path):
    assert values(read_file(tmp_path / "a.jsonl", '{"a": "x\u2028y"}\n')) == [{"a": "x\u2028y"}]


def test_quoting_off_keeps_the_quotes(tmp_path):
    content = 'sentence\tlabel\n"half a quote\t1\n'
    assert values(read_file(tmp_path / "a.tsv", content, quoting="none")) == [
        {"sentence": '"half a quote', "label": "1"}
    ]
    with pytest.raises(DataError, match=r"a\.tsv, line 2: .*quoting: none"):
        read_file(tmp_path / "a.tsv", content)


def test_long_fields_are_read_and_the_limit_of_csv_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    assert len(read_file(tmp_path / "a.csv", "a,b\n" + "x" * 200_000 + ",1\n").rows[0].values["a"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_separator_divides_lines_at_its_first_place(tmp_path):
    source = read_file(tmp_path / "a.txt", "name : X || it is X . \nq||a||b\n", separator="||")
    assert values(source) == [
        {"prompt": "name : X", "completion": "it is X ."},
        {"prompt": "q", "completion": "a||b"},
    ]


def test_text_units(tmp_path):
    text = "one\ntwo\n\nthree\n"
    lines = read_file(tmp_path / "a.txt", text, unit="line").rows
    assert [(row.values["text"], row.line, row.whole) for row in lines] == [
        ("one", 1, True),
        ("two", 2, True),
        ("three", 4, True),
    ]
    paragraphs = read_file(tmp_path / "a.txt", text, unit="paragraph").rows
    assert [(row.values["text"], row.line) for row in paragraphs] == [("one\ntwo", 1), ("three", 4)]


def test_blocks_hold_whole_lines_and_lose_none(tmp_path):
    text = "".join(f"{'x' * size}\n" for size in (3, 4, 1, 15, 2, 2, 2))
    blocks = read_file(tmp_path / "a.txt", text).rows
    assert [row.values["text"] for row in blocks] == ["xxx\nxxxx\n", "x\n", "x" * 15 + "\n", "xx\nxx\nxx"]
    assert [row.line for row in blocks] == [1, 3, 4, 5]
    assert not any(row.whole for row in blocks)
    assert "".join(row.values["text"] for row in blocks) == text.rstrip("\n")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"a": 1}\n' * 16 + '{"a": \n', "a.jsonl, line 17: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[2]\n', "a.jsonl, line 2: [2] is not a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl, line 1: not valid JSON"),
        ("a.json", '{"a": 1}', "a.json, line 1: a .json file must be one list"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json, line 2: not valid JSON"),
        ("a.json", '[{"a": 1},\n{"a": 1, "b": 2, "a": 3}]', "a.json, line 2: the key 'a' stands more than once"),
        ("a.jsonl", '{"a": 1}\n{"a": [{"b": 1, "b": 1}]}', "a.jsonl, line 2: the key 'b' stands more than once"),
        ("a.json", '[{"a": 1},\n\n3]', "a.json, line 3: 3 is not a JSON object"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "a.json, line 2: not valid JSON"),
        ("a.json", '[{"a": 1},\n]', "a.json, line 2: not valid JSON"),
        ("a.json", '[{"a": 1}', "a.json, line 1: not valid JSON"),
        ("a.json", '[{"a": 1}]\n]', "a.json, line 1: not valid JSON"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv, line 3: 3 columns where the header has 2"),
        ("a.csv", 'a,b\n1,2\n"1,2\n1,2\n', "a.csv, line 3: not valid csv"),
        ("a.csv", "a,a\n1,2\n", "a.csv, line 1: the header ['a', 'a']"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.jsonl", "", "has no rows"),
        ("a.parquet", "", "a.parquet is not a readable parquet file"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz is not a complete gzip file"),
        ("a.xlsx", "", "is not a kind of file weftlora reads"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, says):
    with pytest.raises(DataError) as error:
        list(read_file(tmp_path / name, content).rows)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_without_the_separator_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt, line 2: no '\|\|' in 'no bars'"):
        read_file(tmp_path / "a.txt", "p||c\nno bars\n", separator="||")


def test_a_separator_belongs_to_text_files(tmp_path):
    with pytest.raises(ConfigError, match=r"is for \.txt files"):
        read_file(tmp_path / "a.csv", "a\n1\n", separator="||")
    with pytest.raises(ConfigError, match=r"needs data\.separator"):
        read_file(tmp_path / "a.txt", "x", format="prompt_completion")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read(tmp_path / "gone.jsonl", DataConfig.parse("x"), LETTER_BLOCKS)
    with pytest.raises(DataError, match="not a complete saved Hugging Face dataset"):
        read(tmp_path, DataConfig.parse("x"), LETTER_BLOCKS)


def test_a_dataset_dict_brings_its_splits_and_class_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})

    def split(*rows):
        return Dataset.from_list([{"text": t, "label": n} for t, n in rows], features=features)

    splits = {"train": split(("a", 1), ("b", 0)), "val": split(("c", 1)), "test": split(("d", -1))}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = read(tmp_path / "saved", DataConfig.parse("x"), LETTER_BLOCKS)
    assert values(source) == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert values(source.parts["validation"]) == [{"text": "c", "label": "yes"}]
    assert values(source.parts["test"]) == [{"text": "d", "label": None}]
    assert source.at(2).endswith("row 2")


def test_a_saved_dataset_without_train_is_refused(tmp_path):
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="the splits test but no train"):
        read(tmp_path / "saved", DataConfig.parse("x"), LETTER_BLOCKS)


def test_a_folder_of_files_is_read_by_split(tmp_path):
    for name, value in {
        "train-0.jsonl": 1,
        "train-1.jsonl.gz": 2,
        "dev.csv": 3,
        "sub/test.parquet": 4,
        ".hidden.jsonl": 5,
        "README.md": 6,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".parquet"):
            Dataset.from_list([{"a": value}]).to_parquet(tmp_path / name)
        elif name.endswith(".csv"):
            (tmp_path / name).write_text(f"a\n{value}\n")
        else:
            raw = json.dumps({"a": value}).encode()
            (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    source = read(tmp_path, DataConfig.parse("x"), LETTER_BLOCKS)
    assert [row.values["a"] for row in source.rows] == [1, 2]
    assert [part.name for part in flat(source)] == [str(tmp_path / "train-0.jsonl"), str(tmp_path / "train-1.jsonl.gz")]
    assert {name: [row.values["a"] for row in part.rows] for name, part in source.parts.items()} == {
        "validation": ["3"],
        "test": [4],
    }
    tested = read(tmp_path, DataConfig.parse({"train": "x", "split": "test"}), LETTER_BLOCKS)
    assert [row.values["a"] for row in tested.rows] == [4]
    with pytest.raises(DataError, match=r"has the splits .* but no unseen"):
        read(tmp_path, DataConfig.parse({"train": "x", "split": "unseen"}), LETTER_BLOCKS)


def test_a_table_says_what_a_row_has_and_not_what_others_have(tmp_path):
    rows = [{"m": [{"role": "user", "content": "a"}]}, {"m": [{"role": "user", "content": "b", "name": "c"}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    source = read(tmp_path / "a.parquet", DataConfig.parse("x"), LETTER_BLOCKS)
    assert values(source) == rows
    assert [row.values for row in source.rows[0:2]] == [source.rows[0].values, source.rows[1].values] == rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(['{"a": "x"}', ' {"a": 1} ', "", "   ", '{"a": "\u2028\u0085"}']), max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    mark=st.booleans(),
)
def test_lines_are_where_they_are_found(tmp_path, monkeypatch, lines, end, last, mark):
    """Against the plain way: the whole file decoded and cut at its line ends, in pieces of a few bytes."""
    text = end.join(lines) + (end if last else "")
    path = tmp_path / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    held = Lines(str(path), path, piece=7)
    wanted = [(number, json.loads(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    assert [(row.line, row.values) for row in held] == wanted
    assert [(held[at].line, held[at].values) for at in range(len(held))] == wanted
    assert held.blank == len(text.split("\n")) - (text.endswith("\n") or not text) - len(wanted)
    assert held.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [row.values for row in pickle.loads(pickle.dumps(held))] == [value for _, value in wanted]


def without_a_class(info):
    record = json.loads(info)
    record["features"]["label"]["names"] = ["no"]
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("dataset_info.json", lambda content: b"null" + content),
        ("dataset_info.json", without_a_class),
        ("state.json", lambda content: content.replace(b"[", b"[null,")),
        (".arrow", lambda content: content.replace(b"wordy", b"\xff\xfe\xfd\xfc\xfb")),
        (".arrow", lambda content: content.replace(b"\x10\x00\x00\x00", b"\xff\xff\xff\x7f")),
        (".arrow", lambda content: content[: len(content) // 2]),
    ],
)
def test_a_saved_dataset_that_is_damaged_is_one_sentence(tmp_path, file, damage):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = [{"text": "wordy", "label": 1}, {"text": "b", "label": 0}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    (path,) = (each for each in (tmp_path / "saved").iterdir() if each.name.endswith(file))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"saved") as refused:
        list(read(tmp_path / "saved", DataConfig.parse("x"), LETTER_BLOCKS).rows)
    assert len(str(refused.value)) <= 2000
