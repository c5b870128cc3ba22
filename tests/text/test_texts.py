"""Text files as people have them: byte order marks, line ends, blank documents, what is no text."""

import codecs
import json
from pathlib import Path

import pytest

from tmjax import cli
from tmjax.errors import InputError
from tmjax.text.documents import read_texts
from tmjax.train.texts import read_training_texts

LINES = ['{"text": "maji"}', '{"text": "ya mto", "id": "b"}']


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_and_line_ends_are_no_text(tmp_path, mark, end) -> None:
    (tmp_path / "a.jsonl").write_bytes(mark + end.join(LINES).encode())
    found = read_texts(str(tmp_path / "a.jsonl"))
    assert found.texts == ("maji", "ya mto") and found.ids == ("1", "b") and found.blank == 0
    assert read_training_texts(str(tmp_path / "a.jsonl")).texts == found
    (tmp_path / "a.txt").write_bytes(mark + end.join(["maji", "", "ya \ufeffmto"]).encode())
    assert read_texts(str(tmp_path / "a.txt")).texts == ("maji", "ya \ufeffmto")  # inside a text it is text


def test_blank_documents_are_skipped_and_counted(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("", "maji", " \n\t", "\u3000", "mto")))
    found = read_texts(str(file))
    assert found.texts == ("maji", "mto") and found.ids == ("2", "5") and found.blank == 3
    file.write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(InputError, match="holds no text: all 2 documents are blank"):
        read_texts(str(file))


REFUSED = {
    "UTF-16": ("x.txt", "maji\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "UTF-16 without a mark": ("x.txt", "maji\n".encode("utf-16-le"), "line 1 holds a NUL character"),
    "NUL": ("x.jsonl", b'{"text": "a"}\n{"text": "a\0b"}\n', "line 2 holds a NUL character"),
    "Latin-1": ("x.txt", "a\nb\ncafé\n".encode("latin-1"), "line 3 is not UTF-8 text (byte 0xe9)"),
    "compressed": ("x.jsonl.gz", b"\x1f\x8b", "is compressed; unpack it first"),
    "half a surrogate": ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2 holds half of a surrogate"),
    "half a surrogate as id": ("x.jsonl", b'{"text": "a", "id": "\\udc00"}\n', "line 1 holds half of a surrogate"),
    "number": ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 has a text field that is a number"),
    "list": ("x.jsonl", b'{"text": ["a"]}\n', "line 1 has a text field that is a list"),
    "null": ("x.jsonl", b'{"text": null}\n', "line 1 has no text field"),
    "ids": ("x.jsonl", b'{"text": "a", "id": 7}\n{"text": "b", "id": "7"}\n', "document id 7 occurs twice"),
    "empty": ("x.txt", b"", "holds no text"),
    "a mark alone": ("x.txt", codecs.BOM_UTF8, "holds no text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_in_one_line(kind: str, tmp_path, capsys, llama_dir) -> None:
    name, data, said = REFUSED[kind]
    (tmp_path / name).write_bytes(data)
    assert cli.run(["evaluate", str(llama_dir), "--texts", str(tmp_path / name)]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and said in error and error.count("\n") == 1 and error.startswith("tmjax: error: ")


def test_dialogues_of_half_surrogates_are_refused(tmp_path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "\\ud800"}\n')
    with pytest.raises(InputError, match="line 2 holds half of a surrogate pair"):
        read_training_texts(str(file))


def test_evaluate_skips_blank_documents_with_a_note(tmp_path, capsys, llama_dir) -> None:
    def score(name: str, texts: list[str]) -> tuple[dict, str]:
        file: Path = tmp_path / name
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        assert cli.run(["evaluate", str(llama_dir), "--texts", str(file), "--json"]) == 0
        printed, error = capsys.readouterr()
        return json.loads(printed)["evaluation"][str(llama_dir)], error

    plain, silence = score("plain.jsonl", ["maji ya mto", "bahari"])
    blank, said = score("blank.jsonl", ["maji ya mto", "", "bahari", "  "])
    assert blank == plain and plain["documents"] == 2
    assert "blank.jsonl: 2 blank documents skipped" in said and "blank" not in silence
