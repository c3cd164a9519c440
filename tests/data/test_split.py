import pytest

from moduleformer_ext.data import Document, split_documents


def _documents(count: int, domain: str = "d") -> list[Document]:
    return [Document(domain, f"{index}.txt", f"text {index}") for index in range(count)]


def test_split_is_a_partition_that_ignores_input_order() -> None:
    documents = _documents(400)
    split = split_documents(documents, 0.1)
    again = split_documents(documents[::-1], 0.1)
    assert split == again
    assert len(split.train) + len(split.held_out) == 400
    assert not set(split.train) & set(split.held_out)
    assert 20 <= len(split.held_out) <= 60


def test_adding_documents_moves_no_other() -> None:
    before = set(split_documents(_documents(200), 0.1).held_out)
    after = set(split_documents(_documents(300), 0.1).held_out)
    assert before == {document for document in after if int(document.name[:-4]) < 200}


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_both_sides_have_text(count: int, fraction: float) -> None:
    split = split_documents([*_documents(count, "a"), *_documents(count, "b")], fraction)
    for side in (split.train, split.held_out):
        assert {document.domain for document in side} == {"a", "b"}


def test_single_document_is_cut_without_loss() -> None:
    text = "".join(f"line {index}\n" for index in range(100))
    split = split_documents([Document("d", "only", text)], 0.2)
    (train,), (held_out,) = split.train, split.held_out
    assert str(train.text) + str(held_out.text) == text
    assert str(train.text).endswith("\n")
    assert 0.15 * len(text) < len(held_out.text) < 0.25 * len(text)


def test_standard_library_split_does_not_leak(library: list[Document]) -> None:
    split = split_documents(library, 0.05)
    assert not {document.name for document in split.train} & {document.name for document in split.held_out}
    assert not {str(document.text) for document in split.train} & {str(d.text) for d in split.held_out}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"held_out: must be a fraction .* got {fraction}"):
        split_documents(_documents(3), fraction)


def test_text_too_short_to_cut() -> None:
    with pytest.raises(ValueError, match="'only' is too short"):
        split_documents([Document("d", "only", "x")], 0.1)
