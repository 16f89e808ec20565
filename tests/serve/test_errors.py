"""Failures as clients expect them."""

from dsjax.serve.errors import ApiError


def test_failure_has_the_shape_of_openais():
    error = ApiError(422, "temperature must be lower", param="temperature")
    assert error.body() == {
        "error": {
            "message": "temperature must be lower",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_request",
        }
    }
    limited = ApiError(429, "full", code="queue_full", retry_after=5)
    assert limited.retry_after == 5
    assert limited.body()["error"]["type"] == "rate_limit_error"
    assert limited.body()["error"]["code"] == "queue_full"
