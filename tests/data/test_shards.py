import itertools

import numpy as np
import pytest

from himoe.data import TokenStream
from himoe.data.shards import OPEN_FILES, ShardWriter, TokenFile, token_type

TOKENS = np.random.default_rng(0).integers(0, 300, 1000)


def written(folder, pieces=(300, 0, 1, 699)):
    """Write TOKENS as shards of the given lengths and return a stream over the files."""
    bounds, files, dtype = np.cumsum([0, *pieces]), [], np.dtype("<u2")
    with ShardWriter(folder, dtype) as writer:
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if stop > start:
                writer.add(f"{i}.tokens", TOKENS[start:stop], num_bytes=0, num_documents=0)
                files.append(TokenFile(folder / f"{i}.tokens", dtype, int(stop - start)))
        writer.finish()
    return TokenStream(files, end_of_document=299, num_bytes=7, num_documents=3)


def test_a_stream_over_files_reads_as_one_array(tmp_path):
    stream = written(tmp_path)
    assert (len(stream), stream.num_tokens, stream.num_bytes, stream.num_documents) == (1000, 1000, 7, 3)
    for start, stop in [(0, 1000), (0, 300), (299, 302), (300, 301), (301, 999), (5, 5), (900, 2000), (1000, 1001)]:
        assert stream[start:stop].tolist() == TOKENS[start:stop].tolist()
        assert stream[start:stop].dtype == np.uint16
    assert stream[:].tolist() == stream[-1000:].tolist() == TOKENS.tolist()


def test_tokens_stay_on_disk_and_read_only(tmp_path):
    part = written(tmp_path)[:10]
    assert isinstance(part, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1


def test_however_many_shards_there_are_few_are_open(tmp_path):
    stream = written(tmp_path, pieces=(4,) * 250)
    assert OPEN_FILES < 250
    assert stream[:].tolist() == TOKENS.tolist()
    assert stream[::1].tolist() == TOKENS.tolist()


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    assert token_type(2**16) == np.uint16
    assert token_type(2**16 + 1) == np.uint32
    with ShardWriter(tmp_path, token_type(2**16 + 1)) as writer:
        writer.add("wide.tokens", [1, 2**16], num_bytes=1, num_documents=1)
        writer.finish()
    assert np.fromfile(tmp_path / "wide.tokens", "<u4").tolist() == [1, 2**16]


def test_a_stream_of_arrays_counts_for_itself():
    stream = TokenStream.of([1, 2, 256], np.array([3, 256, 256]), [], end_of_document=256)
    assert stream[2:5].tolist() == [256, 3, 256]
    assert (stream.num_documents, stream.num_bytes, stream.dtype) == (3, 3, np.uint16)
    assert TokenStream.of([70_000], end_of_document=70_000, num_bytes=5).num_bytes == 5
    assert TokenStream.of([70_000], end_of_document=70_000)[:].tolist() == [70_000]
    assert TokenStream.of(np.array([70_000, 1]), end_of_document=1)[:].tolist() == [70_000, 1]
    assert len(TokenStream.of(end_of_document=1)[:]) == 0


def test_a_shard_is_described_by_what_was_added(tmp_path, monkeypatch):
    monkeypatch.setattr("himoe.data.shards.BUFFER", 10)
    with ShardWriter(tmp_path, np.dtype("<u2")) as writer:
        for ids in ([1, 2, 3], [4], [5, 6, 7, 8]):
            writer.add("a.tokens", ids, num_bytes=10, num_documents=1)
            writer.add("b.tokens", ids[:1], num_bytes=1, num_documents=0)
        a, b = writer.finish()
    assert np.fromfile(tmp_path / "a.tokens", "<u2").tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert np.fromfile(tmp_path / "b.tokens", "<u2").tolist() == [1, 4, 5]
    assert [a[key] for key in ("file", "tokens", "bytes", "documents")] == ["a.tokens", 8, 30, 3]
    assert [b[key] for key in ("file", "tokens", "bytes", "documents")] == ["b.tokens", 3, 3, 0]


def test_a_broken_off_write_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, np.dtype("<u2")) as writer:
        writer.add("a.tokens", np.zeros(10**7, int), num_bytes=1, num_documents=1)
        assert list(tmp_path.iterdir()) != []
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
