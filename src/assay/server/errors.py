"""What a client is told when something is wrong, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A status, a message, the field it is about, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def going_down() -> ApiError:
    """What clients are told while the server stops."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "10"})


def overloaded(message: str) -> ApiError:
    """What clients are told who come when there is no room for them."""
    return ApiError(503, f"{message}; try again later", code="overloaded", headers={"Retry-After": "2"})


def no_model(message: str) -> ApiError:
    """What clients are told who ask for a model that is not here."""
    return ApiError(404, message, param="model", code="model_not_found")


def unsupported(name: str, message: str) -> ApiError:
    """The refusal of a parameter by its name."""
    return ApiError(400, message, param=printable(name), code="unsupported_parameter")


def printable(text: str) -> str:
    """`text` cut short, in ASCII."""
    return text[:100].encode("ascii", "backslashreplace").decode()
