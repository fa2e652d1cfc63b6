"""Access to the real service: settings that it will not start with, keys that change, TLS, and what no log has."""

import asyncio
import json
import os
import re
import ssl
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import trustme

from tests.service.scripted_model import ScriptedModel
from tests.service.server import COMMAND, Connect, Start, eventually

ALICE = "mgpt-" + "a" * 43


async def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """The command to its end: exit code, standard output and error."""
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A folder with cert.pem and key.pem of 127.0.0.1, and what a client of it trusts."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return folder, context


# Settings


async def test_settings_of_access_that_cannot_be_used(tmp_path: Path, authority: tuple[Path, ssl.SSLContext]) -> None:
    """Each ends it with 2 before it listens, in one line that names the setting, and has no key or password."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"- name: alice\n  sha256: {ALICE}\n")
    folder, _ = authority
    tls = ("--ssl-certfile", str(folder / "cert.pem"))
    for arguments, message in (
        (["--api-key-file", str(bad)], f"api_key_file: {bad}: entry 1: sha256: String should match"),
        (["--api-key-file", str(tmp_path / "no")], f"api_key_file: {tmp_path}/no: No such file or directory"),
        (["--api-key", ALICE, ALICE], "api_key: entry 2: the same key as entry 1"),
        (["--api-key", f"{ALICE} x"], "api_key: key 1 has characters that no client can send"),
        (["--open-routes", "/metrics", "/v1/models"], "open_routes: /v1/models is none of /metrics"),
        (["--cors-origins", "https://a.example/"], "cors_origins: https://a.example/ is no scheme://host"),
        (["--ssl-certfile", str(bad)], f"ssl_certfile: {bad}: has no certificate (PEM)"),
        ([*tls, "--ssl-keyfile", str(bad)], f"ssl_keyfile: {bad}: has no key (PEM)"),
        (["--ssl-keyfile-password", ALICE], "ssl_keyfile_password: needs ssl_certfile"),
    ):
        code, out, err = await run("serve", *arguments, "--port", "0", "--log-format", "text")
        assert (2, "", 1) == (code, out, err.count("\n")), err
        assert message in err
        assert ALICE not in err


# Keys


async def test_keys_change_while_it_serves(start: Start, connect: Connect, tmp_path: Path) -> None:
    """A key made by the command is known within moments, one that is removed no longer; a stream goes on to its end."""
    file = tmp_path / "keys.yaml"
    _, first, _ = await run("key", "new", "first", "--file", str(file))
    server = start("--api-key-file", str(file))
    client = connect(server)

    async def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key.strip()}"}
        return (await client.http.get("/v1/models", headers=headers)).status_code

    assert (200, 401) == (await status(first), await status(ALICE))
    assert (
        "/v1/models"
        in (await client.http.get("/openapi.json", headers={"Authorization": f"bearer {first.strip()}"})).text
    )
    _, second, _ = await run("key", "new", "second", "--file", str(file))

    async def second_is_known() -> bool:
        return await status(second) == 200

    await eventually(second_is_known)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=first.strip(), max_retries=0) as package:
        stream = await package.completions.create(
            model="megatron-gpt2-demo", prompt="My", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = [await anext(stream)]
        await run("key", "remove", "first", "--file", str(file))

        async def first_is_gone() -> bool:
            return await status(first) == 401

        await eventually(first_is_gone)
        pieces += [piece async for piece in stream]
        assert "length" == pieces[-1].choices[0].finish_reason
        with pytest.raises(openai.AuthenticationError) as refused:
            await package.completions.create(model="megatron-gpt2-demo", prompt="My")
        assert "invalid_api_key" == refused.value.code
    file.write_text("- name: second\n")

    async def error_is_logged() -> bool:
        return any("keys that were read before stay" in line for line in server.log)

    async def asked() -> bool:
        return await status(second) == 200 and await error_is_logged()

    await eventually(asked)


# What the log keeps out


def markers(text: str) -> list[str]:
    return re.findall(r"SECRET\w*", text)


async def test_no_secret_and_no_text_of_a_request_is_in_the_log(
    start: Start, connect: Connect, tmp_path: Path, scripted_model: ScriptedModel
) -> None:
    """Nor in the list of processes, at debug level: of keys right and wrong, prompts, fields, bad bodies, URLs."""
    key = "SECRET" + "k" * 30
    server = start(
        str(scripted_model.folder), "--log-level", "debug", environment={"MGPT_API_KEY": f"{key},SECRETother"}
    )
    client = connect(server)
    client.http.headers["Authorization"] = f"Bearer {key}"
    texts: list[dict[str, Any]] = [
        {"prompt": "SECRETprompt", "stop": ["SECRETstop"], "user": "SECRETuser", "cache_salt": "SECRETsalt"},
        {"prompt": "SECRETprompt", "stream": True, "unknown_field": "SECRETvalue", "bad_words": ["SECRETbad"]},
        {"prompt": "SECRETprompt " * 2000},
        {"prompt": "x", "model": "SECRETmodel"},
        {"prompt": "x", "temperature": "SECRETtemperature"},
        {"prompt": "x", "suffix": "SECRETsuffix"},
        {"prompt": "x", "stop": "SECRET" * 1000},
        {"prompt": "x", "guided_regex": "(SECRETregex"},
        {"prompt": "x", "guided_choice": ["SECRETchoice"], "max_tokens": 20},
        {"prompt": "x", "guided_json": {"type": "SECRETschema"}},
        {"prompt": {"SECRETkey": "SECRETvalue"}},
        {"prompt": "SECRETprompt", "echo": True, "logprobs": 3, "max_tokens": 2},
    ]
    statuses = [(await client.post(**text)).status_code for text in texts]
    assert {200, 400, 404} == set(statuses)
    for body in (
        b"SECRETbody",
        b'{"prompt": "SECRETbody"',
        b'{"prompt": "SECRET\xff"}',
        b'["SECRETbody"]',
        b"\x00SECRET",
    ):
        for path in ("/v1/completions", "/api", "/v1/score", "/tokenize", "/detokenize"):
            assert 400 == (await client.http.post(path, content=body)).status_code
    for path, body in (
        ("/api", {"prompts": ["SECRETprompt"], "tokens_to_generate": 2}),
        ("/api", {"prompts": ["SECRETprompt"], "sentences": "SECRETfield"}),
        ("/v1/score", {"items": [{"context": "SECRETcontext", "continuation": "SECRETcontinuation"}]}),
        ("/tokenize", {"prompt": "SECRETprompt"}),
        ("/v1/SECRETpath?SECRETquery=SECRETvalue", {}),
        ("/v1/models/SECRETmodel", {}),
    ):
        await client.http.post(path, json=body)
    await client.http.get("/v1/models/SECRETmodel", headers={"Cookie": "SECRETcookie", "User-Agent": "SECRETagent"})
    for wrong in ("Bearer SECRETwrong", "SECRETscheme x", "Basic SECRETbasic", f"Bearer {key}x"):
        for path in ("/v1/completions", "/SECRETpath"):
            answer = await client.http.post(path, json=texts[0], headers={"Authorization": wrong})
            assert 401 == answer.status_code
            assert not markers(answer.text)
    url = httpx.URL(server.url)
    for head in (b"SECRETmethod /SECRETpath HTTP/1.1", b"GET /SECRETpath HTTP/9.9", b"\x00\x01SECRETbytes", b"GET"):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head + b"\r\nSECRETheader\x00: SECRETvalue\r\n\r\n")
        await reader.read()
        writer.close()
        await writer.wait_closed()
    leaving = asyncio.ensure_future(client.post(prompt="SECRETprompt", max_tokens=1000, ignore_eos=True, stream=True))
    await client.wait_metric("requests_running", 1)
    server.engine.kill()  # an error within a stream, and a restart
    await leaving
    await client.wait_status("/readyz", 200)
    assert not markers(" ".join(word for process in server.children for word in process.cmdline()))
    assert not markers(" ".join(psutil.Process(server.process.pid).cmdline()))
    server.process.terminate()
    assert 0 == await asyncio.to_thread(server.wait, 20)
    log = "".join(server.log)
    assert [] == markers(log)
    clients = {json.loads(line).get("figures", {}).get("client") for line in server.log}
    assert {"key-1", "unknown", "127.0.0.1"} <= clients


# TLS


async def test_tls(start: Start, connect: Connect, authority: tuple[Path, ssl.SSLContext]) -> None:
    """Plain answers and streams over https, as the log says where; plain HTTP is no way in."""
    folder, context = authority
    files = ("--ssl-certfile", str(folder / "cert.pem"), "--ssl-keyfile", str(folder / "key.pem"))
    server = start(*files, environment={"MGPT_API_KEY": ALICE}, verify=context)
    assert server.url.startswith("https://127.0.0.1:")
    client = connect(server)
    client.http.headers["Authorization"] = f"Bearer {ALICE}"
    body: dict[str, Any] = {"prompt": "My fellow citizens", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    streamed = await client.stream(**body)
    assert (await client.complete(**body))["choices"][0]["text"] == streamed.text()
    assert len(streamed.pieces[0]) > 1
    leaving = asyncio.ensure_future(client.post(**body | {"max_tokens": 1000, "n": 8}))
    await client.wait_metric("requests_running", 8)
    leaving.cancel()
    await asyncio.wait([leaving])
    await client.wait_metric("requests_running", 0, seconds=5)
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as stranger:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger.get("/livez")
    async with httpx.AsyncClient(base_url=server.url.replace("https", "http"), timeout=10) as plainly:
        with pytest.raises(httpx.TransportError):
            await plainly.get("/livez")
    server.process.terminate()
    assert 0 == await asyncio.to_thread(server.wait, 20)
    assert "Traceback" not in "".join(server.log)


async def test_an_address_that_others_can_reach(start: Start) -> None:
    """Without keys that is a warning; with keys the line says that they are asked for."""
    for environment, level, words in (
        ({}, "WARNING", "nobody is asked for a key"),
        ({"MGPT_API_KEY": ALICE}, "INFO", "asks for keys"),
    ):
        server = start("--host", "0.0.0.0", ready=False, environment=environment)

        async def told(log: list[str] = server.log) -> list[str]:
            return [line for line in log if "can be reached from other machines" in line]

        (line,) = await eventually(told)
        assert level == json.loads(line)["level"]
        assert words in line
        server.kill()
