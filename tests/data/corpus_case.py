"""What tests look at in a prepared corpus."""

from pathlib import Path

from himoe.data import Corpus, Tokenizer, TokenStream
from himoe.data.preparation import prepare as preparation


def documents_of(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    """Return the documents of a stream, in order."""
    found, ids = [], []
    for token in stream[:].tolist():
        if token == stream.end_of_document:
            found.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(token)
    assert not ids, "a stream ends with the end of a document"
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def all_documents(corpus: Corpus, side: str) -> list[str]:
    """Return the documents of all domains on one side, "train" or "held_out"."""
    return [text for stream in getattr(corpus, side).values() for text in documents_of(stream, corpus.tokenizer)]


def source_documents(path: Path) -> list[str]:
    """Return the documents of all domains as they are read."""
    return [text for unit in preparation.read_source(path).units for _, text in unit.documents()]
