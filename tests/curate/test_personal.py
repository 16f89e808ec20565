"""What identifies or unlocks is replaced, and nothing else."""

import pytest

from dsjax.curate import personal
from dsjax.curate.personal import ADDRESS, EMAIL, KEY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to Jo.Doe+x@mail.uni-a.edu.", f"Write to {EMAIL}."),
        ("<a_b@x.io>, c@d.org", f"<{EMAIL}>, {EMAIL}"),
        ("from 8.8.8.8:53 or (1.1.1.1).", f"from {ADDRESS}:53 or ({ADDRESS})."),
        (f"k = '{'AKIA' + 'ABCDEFGH12345678'}'", f"k = '{KEY}'"),
        ("token=" + "ghp_" + "a1B2" * 9, f"token={KEY}"),
        ("github_pat_" + "a1B2" * 15, KEY),
        ("(glpat-" + "a1B2" * 5 + ")", f"({KEY})"),
        ("'sk-" + "a1B2" * 8 + "'", f"'{KEY}'"),
        ("hf_" + "a1B2" * 8, KEY),
        ("xoxb-" + "a1B2" * 5, KEY),
        ("AIza" + "a1B2_" * 7, KEY),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\n",
            f"-----BEGIN RSA PRIVATE KEY-----\n{KEY}\n-----END RSA PRIVATE KEY-----\n",
        ),
    ],
)
def test_replaced(text, expected):
    assert personal.replace(text) == expected
    assert personal.replace(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "name@example.com, root@localhost, @decorator, a @ b",
        "127.0.0.1, 192.168.1.10, 10.0.0.1, 192.0.2.7",
        "version 1.2.3.4.5, v8.8.8.8, 300.1.1.1, 8.8.8.8-rc1, section 1.2.3",
        "sk-learn, hf_hub, the task-force, AKIA",
        "desk-" + "a1B2" * 8 + " dhf_" + "a1B2" * 8 + " xAKIA" + "ABCD" * 4,
        "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----",
        "",
    ],
)
def test_left_alone(text):
    assert personal.replace(text) == text
