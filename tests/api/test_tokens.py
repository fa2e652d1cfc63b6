"""/tokenize, /detokenize and /tokenizer_info: text to ids and back, as remote tokenizers ask for it."""

import random
from typing import Any

import pytest

from service.api.tokens import Detokenized, Tokenized, TokenizerInfo
from tests.api.conftest import Service, Start

SPLIT = [27, 91, 437, 1659, 5239, 91, 29]  # the end of text as plain text


async def post(api: Service, path: str, **body: Any) -> dict[str, Any]:
    response = await api.http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "Hello world"}, [15496, 995]),
        ({"prompt": "Hello world", "model": "org/alias", "add_special_tokens": False}, [15496, 995]),
        ({"prompt": "a", "model": None, "split_special_tokens": None, "add_special_tokens": None}, [64]),
        ({"prompt": "a", "messages": [], "add_generation_prompt": True}, [64]),
        ({"prompt": "a<|endoftext|>b"}, [64, 50256, 65]),
        ({"prompt": "a<|endoftext|>b", "split_special_tokens": True}, [64, *SPLIT, 65]),
        ({"prompt": ""}, []),
        ({"prompt": " world" * 1024}, [995] * 1024),
        ({"prompt": " world" * 20_000}, [995] * 20_000),  # longer than the context: its count is what was asked
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_text_becomes_ids(api: Service, body: dict[str, Any], tokens: list[int]) -> None:
    """Nothing is added, an empty text has none, and the end of text is one id unless it is to be split."""
    expected = {"tokens": tokens, "count": len(tokens), "max_model_len": 1024}
    assert expected == await post(api, "/tokenize", **body)


async def test_token_strs_are_the_names_of_log_probabilities(api: Service) -> None:
    """Only when asked for; one a token, also where it is a piece of a character."""
    answer = await post(api, "/tokenize", prompt="a👍<|endoftext|>", return_token_strs=True)
    Tokenized.model_validate(answer, strict=True)
    assert [64, 41840, 235, 50256] == answer["tokens"]
    assert ["a", r"bytes:\xf0\x9f\x91", r"bytes:\x8d", "<|endoftext|>"] == answer["token_strs"]


async def test_any_text_survives_the_round_trip(api: Service) -> None:
    """Through HTTP and back, also with the end of text in it, however that is read."""
    drawn = random.Random(0)
    pieces = ["a", " the", "\n", "\u2028", "\x00", "é", "日", "👍", "\ufffd", "<|", "endoftext", "|>", "<|endoftext|>"]
    for text in ["", *("".join(drawn.choices(pieces, k=9)) for _ in range(20))]:
        for split in (False, True):
            ids = (await post(api, "/tokenize", prompt=text, split_special_tokens=split))["tokens"]
            answer = await post(api, "/detokenize", tokens=ids)
            Detokenized.model_validate(answer, strict=True)
            assert text == answer["prompt"]


async def test_bytes_that_are_no_text_are_replaced(api: Service) -> None:
    """Each broken character is one U+FFFD, and what follows it stands."""
    assert {"prompt": "\ufffda"} == await post(api, "/detokenize", tokens=[41840, 64])
    assert {"prompt": ""} == await post(api, "/detokenize", tokens=[])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "split_special_tokens": "yes"}, "split_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "15496"}, "tokens"),
        ("/detokenize", {"tokens": [15496, True]}, "tokens.1"),
        ("/detokenize", {"tokens": [15496, "995"]}, "tokens.1"),
        ("/detokenize", {"tokens": [50257]}, "tokens"),
        ("/detokenize", {"tokens": [0, -1]}, "tokens.1"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
    ids=str,
)
async def test_wrong_fields_are_named(api: Service, path: str, body: dict[str, Any], param: str) -> None:
    """Types are strict, and ids are of the vocabulary."""
    response = await api.http.post(path, json=body)
    error = response.json()["error"]
    assert (400, "invalid_request_error", param) == (response.status_code, error["type"], error["param"])
    assert error["message"].startswith(param)


async def test_a_text_may_have_a_mebibyte(api: Service) -> None:
    """There and back, however many tokens that are; no more, since a few bytes of ids can be a long text."""
    text = "a日" * 2**18
    assert 2**20 == len(text.encode())
    tokens = (await post(api, "/tokenize", prompt=text))["tokens"]
    assert {"prompt": text} == await post(api, "/detokenize", tokens=tokens)
    for path, body, param in [
        ("/tokenize", {"prompt": text + "a"}, "prompt"),
        ("/detokenize", {"tokens": [*tokens, 64]}, "tokens"),
    ]:
        response = await api.http.post(path, json=body)
        error = response.json()["error"]
        assert (400, param) == (response.status_code, error["param"])
        assert "1048576" in error["message"]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [64]})])
async def test_an_unknown_model_is_not_found(api: Service, path: str, body: dict[str, Any]) -> None:
    response = await api.http.post(path, json=body | {"model": "gpt-4"})
    assert (404, "model_not_found") == (response.status_code, response.json()["error"]["code"])


async def test_while_loading_all_are_unavailable(start: Start) -> None:
    """With Retry-After: the tokenizer comes with the model."""
    api: Service = await start(ready=False)
    answers = [
        await api.http.post("/tokenize", json={"prompt": "a"}),
        await api.http.post("/detokenize", json={"tokens": [64]}),
        await api.http.get("/tokenizer_info"),
    ]
    assert [503, 503, 503] == [answer.status_code for answer in answers]
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)


async def test_tokenizer_info_is_what_remote_tokenizers_read(api: Service) -> None:
    """lm-evaluation-harness takes the tokens' strings from here and encodes them for their ids."""
    info = (await api.http.get("/tokenizer_info")).json()
    TokenizerInfo.model_validate(info, strict=True)
    assert {"tokenizer_class": "GPT2Tokenizer", "vocab_size": 50257, "model_max_length": 1024}.items() <= info.items()
    assert {"pad_token": None, "chat_template": None, "eos_token_id": 50256}.items() <= info.items()
    for name in ("bos_token", "eos_token", "unk_token"):
        ids = (await post(api, "/tokenize", prompt=info[name], add_special_tokens=False))["tokens"]
        assert [info["eos_token_id"]] == ids
