"""What the next token of a reply may be."""

import numpy as np

from dsjax.serve.steering import Rules


class Even:
    """A grammar that admits even tokens, and remembers what it was told."""

    def __init__(self):
        self.seen = []

    def allowed(self):
        return np.arange(8) % 2 == 0

    def push(self, token):
        self.seen.append(token)


def test_penalties_count_the_replys_tokens():
    rules = Rules(4, logit_bias={3: 5.0}, frequency_penalty=0.5, presence_penalty=1.0)
    assert rules.bias().tolist() == [0, 0, 0, 5]
    for token in (1, 1, 3):
        rules.push(token)
    assert rules.bias().tolist() == [0, -2, 0, 3.5]
    assert rules.bias().dtype == np.float32


def test_grammar_forbids_and_is_told():
    grammar = Even()
    rules = Rules(8, grammar=grammar, logit_bias={2: 1.0})
    assert np.isneginf(rules.bias()).tolist() == [False, True] * 4
    assert rules.bias()[2] == 1.0
    rules.push(2)
    assert grammar.seen == [2]


def test_grammar_rules_the_answer_and_not_the_thought():
    grammar = Even()
    rules = Rules(8, grammar=grammar, thought=True, think_ids=(5, 6))
    assert np.isfinite(rules.bias()).all()
    rules.push(3)
    rules.push(6)
    assert grammar.seen == [] and np.isneginf(rules.bias()[1])
    rules.push(4)
    assert grammar.seen == [4]
    rules.push(5)
    assert np.isfinite(rules.bias()).all()
