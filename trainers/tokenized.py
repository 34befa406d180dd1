"""The tokens of a hub data set in one file, written once on a machine and mapped by every worker.

A corpus of 94 billion tokens fits no memory, and eight workers of a machine would tokenize it eight
times. The file stands beside the data set's own cache (`HF_DATASETS_CACHE`, `HF_HOME`), under a
name made of the data set's fingerprint and of what the tokenizer does to text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock

from trainers.checkpoints import load_tokenizer
from trainers.config import HubCorpus, hash_of

DOCUMENTS_AT_ONCE = 1000


def tokens(corpus: HubCorpus, tokenizer_folder: Path, heldout: bool) -> np.ndarray:
    """All documents of the split, tokenized and joined by newlines: (tokens) of int32, on disk.

    Whoever comes first writes the file; others wait for it. Private to this process where written
    to.
    """
    import datasets

    split = corpus.heldout_split if heldout else corpus.train_split
    data = datasets.load_dataset(corpus.dataset, corpus.name, split=split, revision=corpus.revision)
    name = hash_of([data._fingerprint, corpus.text_field, content(tokenizer_folder)])
    path = Path(datasets.config.HF_DATASETS_CACHE) / "orchestrate-tokens" / f"{name}.int32"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                texts = (batch[corpus.text_field] for batch in data.iter(DOCUMENTS_AT_ONCE))
                _write(texts, tokenizer_folder, path)
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=np.int32)
    return np.memmap(path, dtype=np.int32, mode="c")


def _write(texts: Iterator[list[str]], tokenizer_folder: Path, path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    part = path.with_suffix(f".{os.getpid()}")
    with part.open("wb") as stream:
        for documents in texts:
            kept = [text + "\n" for text in documents if text.strip()]
            for ids in tokenizer(kept, add_special_tokens=False)["input_ids"] if kept else ():
                stream.write(np.asarray(ids, dtype=np.int32).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


@lru_cache(maxsize=64)
def content(tokenizer_folder: Path) -> str:
    """A hash of what decides which tokens a text becomes.

    Of the tokenizer as it is loaded: each save may write its files in another way, and which of
    their settings are obeyed is for the tokenizer's class to say. Of one that is Python code and
    cannot be written down, a hash of its files.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()  # whoever calls the tokenizer decides on these two
        backend.no_padding()
        return hash_of([backend.to_str(), backend.encode_special_tokens])
    found = hashlib.sha256()
    for file in sorted(tokenizer_folder.glob("*token*")):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
