"""Clients of a fleet that go on asking while something happens to it, and see every request that fails.

Many streams of many lengths and whole answers too, of several models, spread over several gateways. A stream is good when every event parses, one
says why it ended, its account has the tokens that were asked for, and [DONE] and the end of the body follow; an answer when it parses and has the
same. Everything else is a failure, and so is a silence that is longer than allowed. What tests say with it:

    with Load(gateways, ["small"], key) as load:
        upgrade()
    # here every request has ended, and one that failed has failed the test

`python -m tests.load --help` does it by hand.
"""

from tests.load.answers import Question, WrongError
from tests.load.load import Gateway, Load, Outcome

__all__ = ["Gateway", "Load", "Outcome", "Question", "WrongError"]
