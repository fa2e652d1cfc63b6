"""Below the app: what is no HTTP request is answered in the envelope too. Given to uvicorn by process.py."""

import http
import uuid

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.errors import ApiError


class EnvelopeProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, but for the body of its own 400, which is plain text there."""

    def send_400_response(self, msg: str) -> None:
        """Answer with the envelope and close the connection, as what follows on it cannot be told apart."""
        response = ApiError(400, msg, code="invalid_http").response({})
        response.headers["X-Request-Id"] = uuid.uuid4().hex
        response.headers["Connection"] = "close"
        head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        status = f"HTTP/1.1 400 {http.HTTPStatus.BAD_REQUEST.phrase}\r\n".encode()
        self.transport.write(status + head + b"\r\n" + bytes(response.body))
        self.transport.close()
