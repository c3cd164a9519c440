"""Text to batches: corpora, split, tokenizer, token streams, Transformer-XL lanes, n-gram baselines."""

from moduleformer_ext.data.corpus import (
    ALL,
    STANDARD_DOMAINS,
    Document,
    check_source,
    check_sources,
    library_fingerprint,
    standard_library,
    text_files,
)
from moduleformer_ext.data.dataset import Dataset, build_dataset, open_dataset
from moduleformer_ext.data.formats import FIELD
from moduleformer_ext.data.lanes import LaneReader, Segment, share_lanes
from moduleformer_ext.data.ngram import Bigram, NGram, Unigram, stream_bits
from moduleformer_ext.data.split import Split, split_documents
from moduleformer_ext.data.stream import TokenStream, tokenize, tokenize_domains
from moduleformer_ext.data.texts import StoredText, TextStore
from moduleformer_ext.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER,
    encode_texts,
    end_of_text_id,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
    write_tokenizer,
    write_tokenizer_config,
)

__all__ = [
    "ALL",
    "END_OF_TEXT",
    "FIELD",
    "STANDARD_DOMAINS",
    "TOKENIZER",
    "Bigram",
    "Dataset",
    "Document",
    "LaneReader",
    "NGram",
    "Segment",
    "Split",
    "StoredText",
    "TextStore",
    "TokenStream",
    "Unigram",
    "build_dataset",
    "check_source",
    "check_sources",
    "encode_texts",
    "end_of_text_id",
    "find_tokenizer",
    "library_fingerprint",
    "load_tokenizer",
    "open_dataset",
    "share_lanes",
    "split_documents",
    "standard_library",
    "stream_bits",
    "text_files",
    "tokenize",
    "tokenize_domains",
    "train_tokenizer",
    "write_tokenizer",
    "write_tokenizer_config",
]
