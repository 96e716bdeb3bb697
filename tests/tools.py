"""Programs that tests need beside Python: where one is missing a test is skipped, and in CI, which installs them, it fails."""

import os
import shutil

import pytest


def needs(tool: str) -> None:
    """Skip the test that calls this, with the reason, unless `tool` is installed.

    `ASSAY_WITHOUT` names tools that are there and of no use, such as npm where its registry cannot be reached.
    """
    if tool in os.environ.get("ASSAY_WITHOUT", "").split():
        pytest.skip(f"{tool} is of no use here")
    if shutil.which(tool) is None:
        assert not os.environ.get("ASSAY_TEST_ALL"), f"{tool} is not installed, and every test was asked for"
        pytest.skip(f"{tool} is not installed")


def needs_sandbox() -> None:
    """The same for the sandbox that programs run in."""
    from assay.methods.core.sandbox import protections

    if not protections().full:
        assert not os.environ.get("ASSAY_TEST_ALL"), f"{protections().missing}, and every test was asked for"
        pytest.skip("no namespaces here")
