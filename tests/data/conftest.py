import pytest

from moduleformer_ext.data import Document, standard_library


@pytest.fixture(scope="session")
def library() -> list[Document]:
    """The standard library's documents; reading them takes seconds."""
    return standard_library()
