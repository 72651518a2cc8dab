"""What the link really carries: a plain socket that pours bytes, and one that counts them."""

from __future__ import annotations

import socket
import threading
import time

CHUNK_BYTES = 1 << 20


class Pourer:
    """Sends to everybody who connects as many bytes as it is asked for, until closed."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="pourer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with connection:
                left = int.from_bytes(connection.recv(8), "big")
                chunk = memoryview(bytes(CHUNK_BYTES))
                while left:
                    size = min(left, CHUNK_BYTES)
                    connection.sendall(chunk[:size])
                    left -= size


def pour(host: str, port: int, num_bytes: int) -> float:
    """Bytes per second over a fresh connection, from the question to the last byte."""
    buffer = bytearray(CHUNK_BYTES)
    with socket.create_connection((host, port)) as connection:
        started = time.perf_counter()
        connection.sendall(num_bytes.to_bytes(8, "big"))
        left = num_bytes
        while left:
            received = connection.recv_into(buffer)
            if not received:
                raise ConnectionError(f"{host}:{port} hung up with {left} bytes to come")
            left -= received
        return num_bytes / (time.perf_counter() - started)
