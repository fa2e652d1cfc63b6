"""The command `megatron-gpt2`: serve, generate, convert, verify, eval, selftest, bench, drain, key."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.settings import ENV_PREFIX, Settings, SettingsError, load
from service.version import VERSION

# Settings of the HTTP service mean nothing to `generate`.
_GENERATE_SETTINGS = (
    "revision",
    "offline",
    "cache_dir",
    "device",
    "dtype",
    "kv_cache_dtype",
    "deterministic",
    "tensor_parallel_size",
    "kv_memory",
    "gpu_memory_utilization",
    "cpu_threads",
    "log_level",
    "log_format",
    "config",
)
_EPILOG = (
    f"Each setting is also an environment variable ({ENV_PREFIX}LOG_LEVEL for --log-level) and a line of the --config "
    "file (log_level: info). A flag beats a variable, a variable beats the file."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code. 2 is a mistake in what was asked, told in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] == "bench":  # it has no settings, and a parser of its own
            from service.load.command import main as bench

            return bench(arguments[1:])
        given = vars(_parser().parse_args(arguments))
        command = given.pop("command")
        own = {name: given.pop(name) for name in _OWN.get(command, ()) if name in given}
        return _run(command, load(given), own)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SettingsError as error:
        print(f"megatron-gpt2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # `serve` drains by itself once it listens
        return 130


def _run(command: str, settings: Settings, own: dict[str, Any]) -> int:
    """Imports are here: each command pays only for what it needs."""
    match command:
        case "serve":
            from service.serve import serve

            return serve(settings)
        case "generate":
            from service.generate import generate

            return generate(settings, text=own.pop("text"), sampling=own)
        case "convert":
            from service.convert import convert

            return convert(settings, target=own.pop("target"), options=own)
        case "eval":
            from service.evaluation.command import evaluate

            return evaluate(settings, task=own.pop("task"), options=own)
        case "selftest":
            from service.selftest.command import selftest

            return selftest(settings, **own)
        case "drain":
            from service.drain import drain

            return drain(settings, seconds=own.get("seconds"))
        case "key":
            return _key(own.pop("action"), own)
        case _:
            from service.verify import verify

            return verify(settings)


def _key(action: str, own: dict[str, Any]) -> int:
    from service import key
    from service.api.keys import AccessError

    try:
        match action:
            case "new":
                key.new(own.pop("name"), file=own.pop("file", None), limits=own)
            case "list":
                key.show(own["file"])
            case _:
                key.remove(own["name"], file=own["file"])
    except AccessError as error:
        raise SettingsError(str(error)) from error
    return 0


_SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "Tokens to generate at most (default 50)."),
    "temperature": (float, "0 takes the best token each time (default 1)."),
    "top_k": (int, "Draw from the K best tokens."),
    "top_p": (float, "Draw from the best tokens that hold this share of the probability."),
    "min_p": (float, "Draw from tokens at least this likely, measured by the best."),
    "seed": (int, "The same seed gives the same text."),
}
_CONVERTING: dict[str, dict[str, Any]] = {
    "form": {
        "flag": "--to",
        "choices": ("huggingface", "megatron", "megatron-core"),
        "help": "A folder of transformers (the default), or a tree of Megatron-LM's, by its older or its core's names.",
    },
    "dtype": {
        "flag": "--dtype",
        "choices": ("float16", "bfloat16", "float32"),
        "help": "Of all tensors; by default each keeps its own.",
    },
    "tensor_parallel": {
        "flag": "--tensor-parallel",
        "type": int,
        "choices": (1, 2, 4, 8, 16),
        "help": "Ranks to split a tree of Megatron-LM's for (default 1).",
    },
    "tokenizer": {"flag": "--tokenizer", "help": "Folder with the tokenizer; by default the checkpoint's, or GPT-2's."},
    "num_heads": {"flag": "--num-heads", "type": int, "help": "Attention heads, of a file that does not tell."},
}
# Those of all tasks; and what each task has besides.
_EVALUATING: dict[str, dict[str, Any]] = {
    "out": {"type": Path, "metavar": "FILE", "help": "Where the report goes (default eval-TASK.json)."},
    "url": {"help": "Score by a running service, through its POST /v1/score, instead of loading a model."},
    "header": {"action": "append", "metavar": "NAME:VALUE", "help": "Header for --url; may be given again."},
    "tokenizer": {"type": Path, "metavar": "FOLDER", "help": "With --url: the server's tokenizer (default GPT-2's)."},
}
_STRIDE = {"type": int, "metavar": "TOKENS"}
_TASKS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "wikitext103": (
        "perplexity by the paper's protocol; needs wiki.test.tokens",
        {"stride": _STRIDE | {"help": "From one window to the next (default 32, the paper's; 512 for a CPU)."}},
    ),
    "lambada": (
        "accuracy of the last word by the paper's protocol; needs lambada_test.jsonl",
        {
            "strict": {
                "action": argparse.BooleanOptionalAction,
                "help": "The whole last word, as in the paper (the default), or the last token.",
            },
            "skip_bad_lines": {"action": "store_true", "help": "Leave out lines that cannot be used, and name them."},
        },
    ),
    "text": (
        "perplexity of any text",
        {"stride": _STRIDE | {"help": "From one window to the next (default 512, or the context where it is less)."}},
    ),
}
_LIMITS = {
    "requests_per_minute": "Requests a minute; without, as many as come.",
    "max_concurrent": "Requests that may be open at a time; without, as many as come.",
    "priority_floor": "The lowest priority number of its requests; by default 0. Lower ones are raised to it.",
}
# What is no setting.
_OWN = {
    "generate": ("text", *_SAMPLING),
    "convert": ("target", *_CONVERTING),
    "eval": ("task", "data", *_EVALUATING, *{name for _, options in _TASKS.values() for name in options}),
    "selftest": ("requests", "seed", "as_json"),
    "drain": ("seconds",),
    "key": ("action", "name", "file", *_LIMITS),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-gpt2", description="MegatronGPT2 345M over HTTP.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve /v1/completions over HTTP", epilog=_EPILOG, allow_abbrev=False)
    serve.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=Settings.model_fields["model"].description)
    _add_settings(serve, [name for name in Settings.model_fields if name != "model"])
    generate = commands.add_parser(
        "generate", help="complete a text, without a server", epilog=_EPILOG, allow_abbrev=False
    )
    generate.add_argument("text", help="the text to go on from")
    generate.add_argument("--model", default=argparse.SUPPRESS, help=Settings.model_fields["model"].description)
    for name, (kind, description) in _SAMPLING.items():
        generate.add_argument(_flag(name), type=kind, default=argparse.SUPPRESS, help=description)
    _add_settings(generate, _GENERATE_SETTINGS)
    convert = commands.add_parser("convert", help="write a checkpoint in another form", allow_abbrev=False)
    convert.add_argument("model", help="a folder or file of Megatron-LM's or transformers', or a hub id")
    convert.add_argument("target", help="the folder to write, which must not be there yet")
    for name, options in _CONVERTING.items():
        convert.add_argument(options["flag"], dest=name, default=argparse.SUPPRESS, **_without_flag(options))
    _add_settings(convert, ("revision", "offline", "log_level", "log_format", "config"))
    verify = commands.add_parser("verify", help="say whether a model can be served", epilog=_EPILOG, allow_abbrev=False)
    verify.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=Settings.model_fields["model"].description)
    _add_settings(verify, ("revision", "offline", "cache_dir", "log_level", "log_format", "config"))
    drain = commands.add_parser(
        "drain",
        help="have a running service take no more requests, and wait until none is open",
        description="For a preStop hook. Ends with 0 when nothing is open, with 1 when something still is, and with 2 "
        "when no service answers. The service goes on refusing requests until it is stopped.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    drain.add_argument(
        "--seconds",
        type=float,
        default=argparse.SUPPRESS,
        help="How long to wait at most; by default drain_seconds. It never ends before the service's unready_seconds "
        "are over, so that balancers have noticed.",
    )
    _add_settings(drain, ("admin_port", "admin_socket", "config"))
    _add_selftest(commands)
    commands.add_parser("bench", help="load on a server with OpenAI's completions, and what it takes", add_help=False)
    _add_key(commands.add_parser("key", help="make, list and remove API keys", allow_abbrev=False))
    _add_eval(commands.add_parser("eval", help="perplexity and accuracy, by the paper's protocols", allow_abbrev=False))
    return parser


def _add_selftest(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    selftest = commands.add_parser(
        "selftest",
        help="whether requests get the same bits alone and in company, on this machine",
        description="Asks a mix of requests alone and in company, on the runner of deterministic mode, or with "
        "--no-deterministic on the other one. Ends with 0 where all answers are the same to the bit, else with 1.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    selftest.add_argument("--model", default=argparse.SUPPRESS, help=Settings.model_fields["model"].description)
    selftest.add_argument(
        "--requests", type=int, metavar="N", default=argparse.SUPPRESS, help="How many (default 256; fewer are faster)."
    )
    selftest.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="Of the mix (default 0).")
    selftest.add_argument(
        "--json", action="store_true", dest="as_json", default=argparse.SUPPRESS, help="Print JSON instead of a table."
    )
    _add_settings(selftest, (*_GENERATE_SETTINGS, "max_num_seqs", "max_num_batched_tokens", "block_size"))


def _add_eval(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, (description, options) in _TASKS.items():
        task = tasks.add_parser(name, help=description, description=description, epilog=_EPILOG, allow_abbrev=False)
        if name == "text":
            task.add_argument("data", type=Path, metavar="FILE", help="The text, UTF-8.")
        else:
            task.add_argument("--data", type=Path, metavar="FILE", required=True, help="The test set's file.")
        for option, how in (options | _EVALUATING).items():
            task.add_argument(_flag(option), default=argparse.SUPPRESS, **how)
        task.add_argument("--model", default=argparse.SUPPRESS, help=Settings.model_fields["model"].description)
        _add_settings(task, (*_GENERATE_SETTINGS, "max_num_seqs", "max_num_batched_tokens"))


def _add_key(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("new", help="print a new key, once", allow_abbrev=False)
    new.add_argument("name", help="who has it; the name is in the log and in the metrics")
    new.add_argument(
        "--file", type=Path, default=argparse.SUPPRESS, help="The file to add it to; without, its entry is printed too."
    )
    for name, description in _LIMITS.items():
        new.add_argument(_flag(name), type=int, metavar="N", default=argparse.SUPPRESS, help=description)
    show = actions.add_parser("list", help="print the names of a file's keys, and their limits", allow_abbrev=False)
    remove = actions.add_parser("remove", help="take a key out of a file", allow_abbrev=False)
    remove.add_argument("name", help="whose key")
    for action in (show, remove):
        action.add_argument("--file", type=Path, required=True, help="The file of keys.")


def _without_flag(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "flag"}


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag for each setting, checked by Settings itself; what is not given is left to the environment and file."""
    for name in names:
        field = Settings.model_fields[name]
        options: dict[str, Any] = {"metavar": name.split("_")[-1].upper()}
        if field.annotation is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif field.default == ():
            options["nargs"] = "+"
        default = "" if field.default in (None, ()) else f" Default: {field.default}."
        description = f"{field.description}{default}".replace("%", "%%")
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, help=description, **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
