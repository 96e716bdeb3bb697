import os

import pytest

from assay.methods.core.sandbox import protections


@pytest.fixture(scope="session", autouse=True)
def namespaces():
    if not protections().full:
        assert not os.environ.get("ASSAY_TEST_ALL"), protections().missing
        pytest.skip(protections().missing[0])
