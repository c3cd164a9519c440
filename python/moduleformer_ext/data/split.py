"""Deterministic train / held-out split of documents, by name."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from moduleformer_ext.data.corpus import Document


@dataclass(frozen=True)
class Split:
    """Documents to fit on and documents to measure on; no document is in both."""

    train: list[Document]
    held_out: list[Document]


def name_hash(name: str, salt: str = "") -> float:
    """Map a name to [0, 1), uniformly over names and alike on every machine."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8, salt=salt.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_documents(documents: Sequence[Document], fraction: float) -> Split:
    """Hold out the documents whose name hashes below `fraction`, in every domain.

    Within each split the order is that of a second hash, which mixes folders. A domain of one document is cut
    at a line end, and where the hash leaves one side of a domain empty, its nearest document crosses over:
    every domain has text on both sides.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"held_out: must be a fraction between 0 and 1 (exclusive), got {fraction}")
    train: list[Document] = []
    held_out: list[Document] = []
    for domain in sorted({document.domain for document in documents}):
        members = [document for document in documents if document.domain == domain]
        if len(members) == 1:
            members, measured = _cut(members[0], fraction)
        else:
            members.sort(key=lambda document: name_hash(document.name))
            names = sorted({name_hash(document.name) for document in members})
            if len(names) == 1:
                raise ValueError(f"text: all documents of domain '{domain}' are named '{members[0].name}'")
            threshold = min(max(fraction, names[1]), names[-1])
            measured = [document for document in members if name_hash(document.name) < threshold]
            members = [document for document in members if name_hash(document.name) >= threshold]
        train += members
        held_out += measured
    train.sort(key=_reading_order)
    held_out.sort(key=_reading_order)
    return Split(train, held_out)


def _reading_order(document: Document) -> tuple[float, str, str]:
    return name_hash(document.name, salt="order"), document.name, document.domain


def _cut(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    """Cut one document in two, the tail being about `fraction` of it."""
    parts = document.text.cut(1.0 - fraction)
    if any(part.is_blank() for part in parts):
        raise ValueError(f"text: '{document.name}' is too short ({len(document.text)} bytes) to hold out a part of it")
    train, held_out = (
        Document(document.domain, f"{document.name}#{side}", part)
        for side, part in zip(("train", "held-out"), parts, strict=True)
    )
    return [train], [held_out]
