"""The served model: what becomes of prompts, which names are known, and a tokenizer that cannot be read."""

import msgspec
import pytest

from service.api.errors import ApiError
from service.api.served import ServedModel
from service.api.text import Tokenizer
from service.engine.client import EngineClient, EngineFailed
from tests.api.fake_engine import MODEL

LONGEST = 1024 * 128  # bytes of a text that may still fit the context
PLAIN_END = (27, 91, 437, 1659, 5239, 91, 29)  # the end of text as plain text


@pytest.fixture
async def served(tokenizer: Tokenizer) -> ServedModel:
    client = EngineClient(api_number=0, stall_seconds=60, on_stall=lambda _: None)
    model = ServedModel(client, names=["demo", "org/alias"], version="1", load_tokenizer=lambda _: tokenizer)
    await model.on_ready(MODEL)
    return model


async def test_each_prompt_becomes_its_ids(served: ServedModel) -> None:
    """Texts are encoded, ids are taken, and the empty prompt of either kind is the end of text."""
    ids, dropped = served.prompt_ids(["Hello world", [1, 2], "", [], "a<|endoftext|>", "b"], MODEL)
    assert [(15496, 995), (1, 2), (50256,), (50256,), (64, 50256), (65,)] == ids
    assert [0] * 6 == dropped


async def test_the_end_of_text_can_be_split(served: ServedModel) -> None:
    """In texts; ids and the empty prompt are what they are."""
    ids, _ = served.prompt_ids(["a<|endoftext|>", [50256], ""], MODEL, split_special=True)
    assert [(64, *PLAIN_END), (50256,), (50256,)] == ids


@pytest.mark.parametrize(
    ("truncate", "side", "kept", "dropped"),
    [
        (2, "left", [(8, 9), (5,), (50256,), (995, 995)], [1, 0, 0, 29_998]),
        (2, "right", [(7, 8), (5,), (50256,), (995, 995)], [1, 0, 0, 29_998]),
        (3, "left", [(7, 8, 9), (5,), (50256,), (995,) * 3], [0, 0, 0, 29_997]),
        (1, "right", [(7,), (5,), (50256,), (995,)], [2, 0, 0, 29_999]),
    ],
)
async def test_a_truncated_prompt_keeps_one_end(
    served: ServedModel, truncate: int, side: str, kept: list[tuple[int, ...]], dropped: list[int]
) -> None:
    """The number of each prompt's dropped tokens is told, and a text may be longer than any context."""
    prompts: list[str | list[int]] = [[7, 8, 9], [5], "", " world" * 30_000]
    assert (kept, dropped) == served.prompt_ids(prompts, MODEL, truncate=truncate, side=side)


@pytest.mark.parametrize("text", ["a" * LONGEST, "é" * (LONGEST // 2)])
async def test_a_text_that_may_fit_is_encoded(served: ServedModel, text: str) -> None:
    """Its length in tokens is for the caller to check."""
    (ids,), _ = served.prompt_ids([text], MODEL)
    assert text == served.tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["a" * (LONGEST + 1), "é" * (LONGEST // 2 + 1)])
async def test_a_text_that_cannot_fit_is_refused(served: ServedModel, text: str) -> None:
    """By its bytes, with the field that it came in."""
    with pytest.raises(ApiError) as refused:
        served.prompt_ids(["a", text], MODEL, param="items.3")
    error = refused.value.body["error"]
    assert (400, "items.3", "context_length_exceeded") == (refused.value.status, error["param"], error["code"])
    assert str(refused.value).startswith("items.3: ")


@pytest.mark.parametrize("prompt", [[-1], [1, 50257], [10**30], [3, -(10**30)]])
@pytest.mark.parametrize("truncate", [None, 1])
async def test_ids_out_of_the_vocabulary_are_refused(
    served: ServedModel, prompt: list[int], truncate: int | None
) -> None:
    """Also those that truncation would drop."""
    with pytest.raises(ApiError, match=r"prompt: ids must be 0\.\.50256, and -?\d+ is not"):
        served.prompt_ids(["a", prompt], MODEL, truncate=truncate)


async def test_names(served: ServedModel) -> None:
    """The first is the one in answers; any of them and none at all are served."""
    assert "demo" == served.name
    for name in (None, "demo", "org/alias"):
        served.check_name(name)
    for name in ("", "Demo", "gpt-4"):
        with pytest.raises(ApiError) as missing:
            served.check_name(name)
        assert (404, "model_not_found") == (missing.value.status, missing.value.body["error"]["code"])


async def test_the_fingerprint_is_of_what_could_change_an_answer(served: ServedModel) -> None:
    """The model's own folder, dtype, mode and kind of device; not its place on the disk or the device's number."""
    same = [msgspec.structs.replace(MODEL, folder="/elsewhere/demo"), msgspec.structs.replace(MODEL, device="cpu:1")]
    other = [
        msgspec.structs.replace(MODEL, folder="demo2"),
        msgspec.structs.replace(MODEL, dtype="bfloat16"),
        msgspec.structs.replace(MODEL, device="cuda:0"),
        msgspec.structs.replace(MODEL, deterministic=True),
    ]
    fingerprints = [served.fingerprint(model) for model in (MODEL, *same)]
    assert 1 == len(set(fingerprints))
    assert 5 == len({fingerprints[0], *(served.fingerprint(model) for model in other)})


async def test_a_tokenizer_that_cannot_be_read_fails_the_client() -> None:
    """Another try would not mend it, so liveness is false and the reason is told."""

    def fail(_: object) -> Tokenizer:
        raise ValueError("vocab.json: no such thing")

    client = EngineClient(api_number=0, stall_seconds=60, on_stall=lambda _: None)
    served = ServedModel(client, names=["demo"], version="1", load_tokenizer=fail)
    await served.on_ready(MODEL)
    with pytest.raises(EngineFailed, match=r"the tokenizer cannot be used: vocab\.json: no such thing"):
        client.check_ready()
