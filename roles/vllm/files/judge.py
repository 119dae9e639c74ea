"""Says whether `vllm serve`, of the environment that runs this file, takes a configuration and understands what was wished.

Takes a request as JSON from its input: `environment`, `config` (the text of the configuration file), `wish` (option -> value, as an
operator wrote it) and `cache` (vLLM's own cache of the instance, if it ever ran). Its last line is an answer in JSON: `refusal`, vLLM's own reason,
empty when there is none; or `unjudged`, why nobody knows.
Goes the way of `vllm serve` until an engine would start: its parser reads the file, its configuration objects are built. No weights are read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from typing import Any, NoReturn

# It takes some ten, twenty for an instance that never ran, a minute on a cold disk, and as long as this only where a host has no time for it.
SECONDS = 900
LENGTH = 600
# What pydantic and argparse put around a reason.
NOISE = re.compile(r"\s*(For further information visit \S+|\[type=.*?input_type=\w+\])")


class RefusalError(Exception):
    """What vLLM refuses, in its own words."""


def one_line(text: object) -> str:
    """Words of vLLM as one line."""
    line = " ".join(NOISE.sub(" ", str(text)).split())
    return line if len(line) <= LENGTH else f"{line[:LENGTH]}..."


def reason(error: BaseException) -> str:
    """What an exception says, and of which option where it knows that."""
    if not hasattr(error, "errors"):
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__
        return one_line(text if error.__cause__ is None else f"{text}: {error.__cause__}")
    found = []
    for one in error.errors():  # of pydantic
        where = ".".join(str(part).replace("_", "-") for part in one["loc"])
        found.append(f"{where}: {one['msg']}" if where else str(one["msg"]))
    return one_line("; ".join(found).replace("Value error, ", "").replace("Assertion failed, ", ""))


def word(value: Any) -> str:
    """A value as a word of a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def read(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """What vLLM's own type functions make of a wished value."""
    if isinstance(value, bool) and action.nargs == 0:
        return value
    many = isinstance(value, list)
    appended = isinstance(action, argparse._AppendAction)  # one value each time that it is named
    if many and action.nargs in ("+", "*"):
        calls = [[word(entry) for entry in value]]
    elif many and appended:
        calls = [[word(entry)] for entry in value]
    else:
        calls = [[word(value)]]
    found = argparse.Namespace(**{action.dest: action.default})
    for words in calls:
        action(parser, found, parser._get_values(action, words), action.option_strings[0])
    return getattr(found, action.dest)


def same(one: Any, other: Any) -> bool:
    """Whether two readings of a value are the same."""
    return one is other or bool(one == other) or repr(one) == repr(other)


def lost(parser: argparse.ArgumentParser, wish: dict[str, Any], understood: argparse.Namespace) -> list[str]:
    """Options whose wished value did not arrive as it was meant."""
    found = []
    for name, value in wish.items():
        action = parser._option_string_actions[f"--{name}"]
        if value == [] and action.nargs == "+":
            continue  # nothing is what it is without the option
        meant = read(parser, action, value)
        if not same(meant, read(parser, action, value)):
            continue  # another one each time, as where a part of it is made up
        actual = getattr(understood, action.dest)
        if not same(meant, actual):
            found.append(f"option {name!r} is {value!r}, but vLLM reads {actual!r}")
    return found


def check_names(parser: argparse.ArgumentParser, wish: dict[str, Any]) -> None:
    """Refuse what the parser would complain of in the words of its command line."""
    for name, value in wish.items():
        action = parser._option_string_actions.get(f"--{name}")
        if action is None:
            raise RefusalError(f"option {name!r} is not one of vllm serve's")
        if isinstance(value, bool) and action.nargs not in (0, "?"):
            raise RefusalError(f"option {name!r} is {value!r}; it takes a value, not true or false")


def refuse(_parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In the place of argparse's way to fail, which prints all options and ends."""
    raise RefusalError(message)


def parsed(vllm: argparse.Namespace, config: str, wish: dict[str, Any]) -> argparse.Namespace:
    """The options, read as the program `vllm` reads them."""
    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign]
    (command,) = (command for command in vllm.commands() if command.name == "serve")
    parser = vllm.parser()
    # The file is read by the parser of `vllm`, which knows no option of its commands; a parser of `vllm serve` alone would read more into it.
    of_serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    check_names(of_serve, wish)
    options = parser.parse_args(["serve", "--config", config])
    if found := lost(of_serve, wish, options):
        raise RefusalError("; ".join(found))
    command.validate(options)
    return options


def build(vllm: argparse.Namespace, options: argparse.Namespace) -> None:
    """Build what an engine is started with."""
    # It asks for parsers by their names, loads plugins, and listens: here on whatever port is free.
    _address, listener = vllm.listen(
        argparse.Namespace(**{**vars(options), "host": "127.0.0.1", "port": 0, "uds": None}), reuse_port=False
    )
    listener.close()
    if options.model_tag is not None:
        options.model = options.model_tag
    vllm.engine.from_cli_args(options).create_engine_config(usage_context=vllm.usage)


def imported() -> argparse.Namespace:
    """What is asked of vLLM, whose modules another version may have elsewhere."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli import serve
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return argparse.Namespace(
        commands=serve.cmd_init,
        listen=serve.setup_server,
        parser=FlexibleArgumentParser,
        engine=AsyncEngineArgs,
        usage=UsageContext.OPENAI_API_SERVER,
    )


def out_of_memory(error: Exception) -> bool:
    """Whether the host or a GPU has no room for a look: that says nothing of the configuration."""
    kinds = ("MemoryError", "OutOfMemoryError", "AcceleratorError")
    return type(error).__name__ in kinds or "CUDA error" in str(error)


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    try:
        vllm = imported()
    except (ImportError, AttributeError) as error:
        return {"unjudged": f"vLLM cannot be imported: {reason(error)}"}
    except Exception as error:  # of a variable of the environment, mostly
        return {"refusal": f"in this environment it does not start: {reason(error)}"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(request["config"])
        file.flush()
        try:
            build(vllm, parsed(vllm, file.name, request["wish"]))
        except Exception as error:
            return {"unjudged" if out_of_memory(error) else "refusal": reason(error)}
        except SystemExit as error:
            return {"refusal": f"vllm serve would end with {error.code}"}
    return {"refusal": ""}


def bring_notes(cache: str) -> None:
    """Give vLLM its notes of classes of models: without one, it looks at a class in another process, which takes as long as all the rest.

    A note names the hash of the class's source: vLLM does not use one of another release.
    """
    with suppress(OSError):
        shutil.copytree(f"{cache}/modelinfos", f"{os.environ['VLLM_CACHE_ROOT']}/modelinfos")


def main() -> None:
    """Answer a request. All that vLLM says meanwhile goes to the errors."""
    signal.alarm(SECONDS)
    request = json.load(sys.stdin)
    os.environ.update(request["environment"])
    bring_notes(request["cache"])
    # Python has read its own already.
    sys.path[1:1] = filter(None, request["environment"].get("PYTHONPATH", "").split(":"))
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        answer = judge(request)
        torch = sys.modules.get("torch")
        answer["gpu"] = bool(torch and torch.cuda.is_initialized())  # whether memory of a GPU was taken for it
        output.write(json.dumps(answer) + "\n")
    # What vLLM has started, threads and helpers, is not waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
