import json

import numpy as np
import pytest

from himoe.data import ByteTokenizer, TokenFile
from himoe.data.token_file import write_token_file
from himoe.errors import DataError

BATCHES = [["ab", "é"], ["", "xyz"]]


class WideTokenizer(ByteTokenizer):
    """Bytes, with more ids than two bytes can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 2**16 + 1
        self.end_of_document = 2**16


@pytest.fixture
def path(tmp_path):
    write_token_file(tmp_path / "train.tokens", iter(BATCHES), ByteTokenizer())
    return tmp_path / "train.tokens"


def test_documents_are_written_one_after_the_other_each_with_its_end(path):
    file = TokenFile(path)
    assert file.tokens.tolist() == [97, 98, 256, 195, 169, 256, 256, 120, 121, 122, 256]
    assert file.document_starts.tolist() == [0, 3, 6, 7]
    assert file.document_starts.dtype == np.int64
    assert (file.num_tokens, file.num_bytes) == (11, 7)


def test_tokens_stay_on_disk_read_only_and_two_bytes_wide(path):
    tokens = TokenFile(path).tokens
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    write_token_file(tmp_path / "wide.tokens", [["ab"]], WideTokenizer())
    file = TokenFile(tmp_path / "wide.tokens")
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [97, 98, 65536]


def test_a_truncated_or_changed_file_is_noticed(path):
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match="20 bytes, expected 22"):
        TokenFile(path)
    path.write_bytes(b"z" + content[1:])
    with pytest.raises(DataError, match="differs from its recorded hash"):
        TokenFile(path)


@pytest.mark.parametrize("meta", ["", "{", "[]", "{}", None])
def test_a_damaged_description_is_noticed(path, meta):
    if meta is None:
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text(meta, encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.tokens: not a readable token file"):
        TokenFile(path)


def test_another_format_is_refused(path):
    meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    path.with_suffix(".json").write_text(json.dumps(meta | {"format": 99}), encoding="utf-8")
    with pytest.raises(DataError, match="format 99, this version reads 1"):
        TokenFile(path)


def test_a_broken_off_write_leaves_no_token_file(tmp_path):
    def batches():
        yield ["one"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_file(tmp_path / "train.tokens", batches(), ByteTokenizer())
    assert not (tmp_path / "train.tokens").exists()
