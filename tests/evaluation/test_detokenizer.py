"""Each rule of the paper's detokenizer, on what it is for and on what it leaves."""

import pytest

from service.evaluation.detokenizer import detokenize

CASES = [
    ("the boys ' coats", "the boys' coats"),
    ("a /' 5/ b", "a /'[0-9]/ b"),  # the original's own slip: a pattern stands where its match was meant to
    ("a well @-@ known man", "a well-known man"),
    ("1 @,@ 000 men", "1,000 men"),
    ("3 @.@ 14", "3.14"),
    ("as follows : one", "as follows: one"),
    ("one ; two", "one; two"),
    ("The end . Then", "The end. Then"),
    ("Stop ! he said", "Stop! he said"),
    ("Who ? he said", "Who? he said"),
    ("one , two", "one, two"),
    ("he ( the king ) came", "he (the king) came"),
    ("he [ the king ] came", "he [the king] came"),
    ("he { the king } came", "he {the king} came"),
    ('he said " come here " twice', 'he said "come here" twice'),
    ("he said ' come here ' twice", "he said 'come here' twice"),
    ("( a\n b )", "(a\nb)"),  # over the end of a line
    ("()", "()"),
    ("= = = = Fourth = = = =", "==== Fourth ===="),
    ("= = = Third = = =", "=== Third ==="),
    ("= = Second = =", "== Second =="),
    ("= First =", "= First ="),
    ("5 ° C", "5°C"),
    ("line \nnext", "line\nnext"),
    ("line\n next", "line\nnext"),
    (" \n = Title = \n \n", "\n= Title =\n\n"),
    ("at N degrees", "at 1 degrees"),
    ("the king 's men", "the king's men"),
    ("\t tab and  two spaces", "\t tab and  two spaces"),
    ("plain text, as it is.", "plain text, as it is."),
    ("", ""),
    (
        " = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre actor . He had a guest "
        "@-@ starring role in 2000 ( at 5 @.@ 30 pm ) , in the play Herons 's run . \n",
        " = Robert Boulter =\n\nRobert Boulter is an English film, television and theatre actor. He had a guest"
        "-starring role in 2000 (at 5.30 pm), in the play Herons's run.\n",
    ),
]


@pytest.mark.parametrize(("spaced", "text"), CASES)
def test_a_rule(spaced: str, text: str) -> None:
    """The spaces that WikiText put there go, and nothing else."""
    assert text == detokenize(spaced)


def test_rules_apply_in_their_order() -> None:
    """The longest marks of headings are joined first; quotes are tightened before what ends in one."""
    assert "========" == detokenize("= = = = = = = =")
    assert "(a, b)" == detokenize("( a , b )")
    assert "the boys'' coats'" == detokenize("the boys ' ' coats '")
